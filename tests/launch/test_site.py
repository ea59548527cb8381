"""Site files and what a job asks for: every key is known, every time is one of SLURM's."""

from pathlib import Path

import pytest

from cauc_dist.errors import BadInput
from launch import site as sites
from launch.site import Container, Resources, Site
from tests.launch.conftest import Launch


def read(folder: Path, text: str) -> Site:
    path = folder / "site.toml"
    path.write_text(text)
    return sites.read(str(path))


def test_a_site_file_fills_its_fields_and_leaves_the_rest(tmp_path: Path) -> None:
    site = read(
        tmp_path,
        'modules = ["cuda/12"]\nsbatch = { hint = "nomultithread" }\n[resources]\npartition = "gpu"\nmem_gb = 8\n'
        '[container]\nkind = "pyxis"\nimage = "cauc.sqsh"\n[environment]\nNCCL_SOCKET_IFNAME = "ib0"\n',
    )
    assert site.modules == ("cuda/12",)
    assert (site.resources.partition, site.resources.mem_gb, site.resources.nodes) == ("gpu", 8.0, 1)
    assert site.container == Container("pyxis", "cauc.sqsh")
    assert site.environment == {"NCCL_SOCKET_IFNAME": "ib0"}
    assert site.sbatch == {"hint": "nomultithread"}
    assert sites.read(None) == Site()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("module = []", "{}: no field 'module' in Site; wanted known fields. Did you mean modules?"),
        (
            "[resources]\nnode = 2",
            "{}: resources: no field 'node' in Resources; wanted known fields. Did you mean nodes",
        ),
        (
            '[container]\nkind = "pyxis"\nimag = "x"',
            "{}: container: no field 'imag' in Container; wanted known fields. Did you mean image?",
        ),
        (
            '[container]\nkind = "docker"\nimage = "x"',
            "{}: container.kind = 'docker'; wanted input should be 'apptainer'",
        ),
        ('[resources]\nnodes = "two"', "{}: resources.nodes = 'two'; wanted input should be a valid integer"),
        ('shared = "/work"', "{}: shared = '/work'; wanted input should be a valid tuple. Mend that field."),
        ("modules = [", "{} is not TOML ("),
    ],
)
def test_what_is_wrong_in_a_site_file_is_named(tmp_path: Path, text: str, wanted: str) -> None:
    with pytest.raises(BadInput) as error:
        read(tmp_path, text)
    assert str(error.value).startswith(wanted.format(tmp_path / "site.toml"))


def test_a_site_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="is not TOML"):
        sites.read(str(tmp_path / "site.toml"))


def test_a_site_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(BadInput) as error:
        sites.read("jaen-zay")
    assert "no site file" in error.value.found
    assert all(path.stem in error.value.wanted for path in sites.SITES.glob("*.toml"))


def test_the_command_line_wins_over_the_site_file(launch: Launch, tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text('[resources]\nnodes = 3\npartition = "gpu"\n')
    for words in (["--site", path], [f"--site={path}"]):
        done = launch("submit", "demo_cauc", "--nodes", "2", *words, "--dry-run")
        assert "#SBATCH --nodes=2\n" in done.out
        assert "#SBATCH --partition=gpu\n" in done.out


TIMES = {"90": 90, "1:30": 2, "0:59": 1, "2:00:00": 120, "2:00:01": 121, "1-0": 1440, "1-02": 1560, "1-02:30": 1590}


@pytest.mark.parametrize("text", TIMES)
def test_times_are_read_as_slurm_reads_them(text: str) -> None:
    assert Resources(time=text).minutes == TIMES[text]


@pytest.mark.parametrize("text", ["", "2h", "0", "0:00", "1-", "-1", "1:2:3:4", "20:00:00 ", "UNLIMITED", "1.5"])
def test_a_time_in_no_form_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(BadInput) as error:
        _ = Resources(time=text).minutes
    assert (error.value.found, error.value.wanted) == (f"--time {text}", "MM, MM:SS, HH:MM:SS, D-HH[:MM[:SS]]")


@pytest.mark.parametrize(
    ("resources", "ranks"),
    [
        (Resources(), 1),
        (Resources(nodes=3), 3),
        (Resources(nodes=2, gpus_per_node=4), 8),
        (Resources(nodes=2, gpus_per_node=4, ranks_per_node=1), 2),
    ],
)
def test_a_rank_a_gpu_unless_told_otherwise(resources: Resources, ranks: int) -> None:
    assert resources.ranks == ranks
