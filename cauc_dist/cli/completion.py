"""`cauc completion SHELL`: a script that completes commands, recipes and options, made from the options themselves."""

import dataclasses
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from cauc_dist.cli import data, machine, results, runs, voice
from cauc_dist.cli.words import BENCH, COMMANDS, STORE, parse


@dataclass(frozen=True)
class Completion:
    shell: Annotated[Positional[Literal["bash", "zsh", "fish"]], tyro.conf.arg(metavar="SHELL")]
    """bash, zsh or fish."""


KINDS: dict[str, Any] = {
    "demo": machine.Demo,
    "doctor": machine.Doctor,
    "ingest": data.Ingest,
    "store info": data.Info,
    "store verify": data.VerifyStore,
    "store append": data.Append,
    "store split": data.Split,
    "augment-preview": data.Preview,
    "train": runs.Train,
    "resume": runs.Resume,
    "probe": results.Probe,
    "finetune": results.Finetune,
    "embed": results.Embed,
    "export": results.Export,
    "report": results.Report,
    "reproduce": results.Reproduce,
    "verify": machine.Verify,
    "bench data": machine.BenchData,
    "bench loss": machine.BenchLoss,
    "bench step": machine.BenchStep,
    "bench scale": machine.BenchScale,
    "completion": Completion,
}

BASH = """\
_cauc() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} at=${{COMP_WORDS[1]}} words=
  [[ $at == store || $at == bench ]] && at="$at ${{COMP_WORDS[2]}}"
  case $at in
{cases}
  esac
  if [[ $COMP_CWORD == 1 ]]; then words="{commands}"
  elif [[ $COMP_CWORD == 2 && ${{COMP_WORDS[1]}} == store ]]; then words="{store}"
  elif [[ $COMP_CWORD == 2 && ${{COMP_WORDS[1]}} == bench ]]; then words="{bench}"
  elif [[ $COMP_CWORD == 2 && ${{COMP_WORDS[1]}} == train && $word != -* ]]; then words="{recipes}"
  elif [[ $COMP_CWORD == 2 && ${{COMP_WORDS[1]}} == reproduce && $word != -* ]]; then words="{studies}"
  elif [[ $word != -* ]]; then words=; fi
  {take}
  [[ $COMP_CWORD == 1 || $word == -* ]] || {add}
}}
complete -o filenames -F _cauc cauc
"""


def completion(arguments: Sequence[str]) -> int:
    asked = parse(Completion, "completion", arguments)
    text = {"bash": bash, "zsh": zsh, "fish": fish}[asked.shell]()
    voice.tell(text, {"shell": asked.shell, "script": text})
    return 0


def names(kind: Any, prefix: str = "") -> Iterator[str]:
    """The options of a dataclass, as tyro names them: --data.store, --no-start for a flag that is set."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        told: list[Any] = []
        if typing.get_origin(hint) is Annotated:
            hint, *told = typing.get_args(hint)
        if any("Positional" in repr(each) or getattr(each, "metavar", None) for each in told):
            continue
        part = next((each.name for each in told if getattr(each, "name", None) is not None), field.name)
        name = ".".join(filter(None, [prefix, part.replace("_", "-")]))
        if dataclasses.is_dataclass(hint):
            yield from names(hint, name)
        else:
            yield f"--{name}"
            if hint is bool:
                yield "--" + ".".join([*name.split(".")[:-1], f"no-{name.split('.')[-1]}"])


def _options() -> dict[str, list[str]]:
    return {command: [*names(kind), *voice.FLAGS, "--help"] for command, kind in KINDS.items()}


def bash() -> str:
    """For bash 4 or later."""
    words = 'mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")'
    return _script(words, 'mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen -f -- "$word")')


def zsh() -> str:
    """The same: zsh reads bash's words, but has no mapfile."""
    words = 'COMPREPLY=($(compgen -W "$words" -- "$word"))'
    return "autoload -U +X bashcompinit && bashcompinit\n" + _script(words, 'COMPREPLY+=($(compgen -f -- "$word"))')


def _script(take: str, add: str) -> str:
    """`take` the words that fit, `add` the files."""
    from cauc_dist.recipes import recipes
    from cauc_dist.studies import studies

    cases = "\n".join(f'    "{command}") words="{" ".join(words)}" ;;' for command, words in _options().items())
    lists: dict[str, Iterable[str]] = {"commands": COMMANDS, "store": STORE, "bench": BENCH}
    lists |= {"recipes": recipes(), "studies": studies()}
    told = {name: " ".join(words) for name, words in lists.items()}
    return BASH.format(cases=cases, take=take, add=add, **told)


def fish() -> str:
    from cauc_dist.recipes import recipes
    from cauc_dist.studies import studies

    first = "complete -c cauc -n __fish_use_subcommand -f -a"
    lines = [f"{first} {name} -d '{text}'" for name, text in ((n, t.replace("'", "\\'")) for n, t in COMMANDS.items())]
    for command, inner in (("store", STORE), ("bench", BENCH), ("train", recipes()), ("reproduce", studies())):
        lines.append(f"complete -c cauc -n '__fish_seen_subcommand_from {command}' -a '{' '.join(inner)}'")
    for command, words in _options().items():
        seen = " ; and ".join(f"__fish_seen_subcommand_from {word}" for word in command.split())
        lines += [f"complete -c cauc -n '{seen}' -l {word.removeprefix('--')}" for word in words]
    return "\n".join(lines) + "\n"
