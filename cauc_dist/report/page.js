"use strict";
// Draws the page from the JSON block `data`: inline SVG and two canvases' worth of pixels, no library, no request
// (a live page alone asks its own server for data.json). Text of others goes in as text nodes, never as markup.
let data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg", tip = document.getElementById("tip"), chosen = {run: 0, column: null};
const off = new Set();
const RAMP = ["440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725"]
  .map(h => [0, 2, 4].map(i => parseInt(h.slice(i, i + 2), 16)));
const NAMED = 7; // categories with a colour of their own

function make(name, attributes = {}, text = "", space = null) {
  const node = space ? document.createElementNS(space, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== "") node.textContent = text;
  return node;
}
const draw = (parent, name, attributes, text) => parent.appendChild(make(name, attributes, text, SVG));
const place = id => document.querySelector(`#${id} .drawn`);
const cut = (text, n) => text.length > n ? text.slice(0, n - 1) + "…" : text;
const colour = k => `var(--c${k % 8})`;
function ramp(u) {
  const x = Math.min(1, Math.max(0, u)) * (RAMP.length - 1), i = Math.min(RAMP.length - 2, Math.floor(x));
  return RAMP[i].map((a, c) => Math.round(a + (RAMP[i + 1][c] - a) * (x - i)));
}
function figure(x) {
  if (x === 0) return "0";
  const size = Math.abs(x);
  return size >= 1e5 || size < 1e-3 ? x.toExponential(2).replace(/\.?0+e/, "e") : String(Number(x.toPrecision(4)));
}
function ticks(low, high, most, whole = false) {
  let step = 10 ** Math.floor(Math.log10((high - low) / most || 1));
  step *= [1, 2, 5, 10].find(m => (high - low) / (step * m) <= most) || 10;
  if (whole) step = Math.max(1, step);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}
function range(values, pad) {
  let low = Infinity, high = -Infinity;
  for (const v of values) { if (v < low) low = v; if (v > high) high = v; }
  if (low > high) return [0, 1];
  const room = (high - low) * pad || (pad ? Math.abs(high) * .05 || .5 : high === low ? 1 : 0);
  return [low - room, high + room];
}

function show(event, lines) {
  tip.textContent = lines.join("\n");
  tip.hidden = false;
  const box = tip.getBoundingClientRect(), x = event.clientX, y = event.clientY;
  tip.style.left = Math.max(4, Math.min(x + 14, document.documentElement.clientWidth - box.width - 4)) + "px";
  tip.style.top = Math.max(4, y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18) + "px";
}
const hide = () => { tip.hidden = true; };

// A figure with axes: X, Y turn values to pixels of the viewBox, `at` gives a pointer's place in it.
function frame(host, o) {
  const box = host.appendChild(make("figure"));
  box.appendChild(make("figcaption", {}, o.title));
  const w = Math.max(260, Math.round(box.clientWidth || 360)), h = o.square ? Math.min(w, 380) : 220;
  const left = 56, right = 10, top = 12, bottom = o.bare ? 10 : 36, edge = o.bare ? 8 : left;
  const svg = make("svg", {viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": o.title, class: "chart"}, "", SVG);
  box.appendChild(svg);
  const [x0, x1] = range(o.xs, o.padx || 0), [y0, y1] = range(o.ys, .06);
  const X = x => edge + (x - x0) / (x1 - x0) * (w - edge - right), Y = y => h - bottom - (y - y0) / (y1 - y0) * (h - bottom - top);
  for (const y of o.bare ? [] : ticks(y0, y1, 5)) {
    draw(svg, "line", {x1: edge, x2: w - right, y1: Y(y), y2: Y(y), class: "grid"});
    draw(svg, "text", {x: edge - 6, y: Y(y) + 4, "text-anchor": "end"}, figure(y));
  }
  for (const x of o.bare || o.names ? [] : ticks(x0, x1, Math.max(3, Math.floor(w / 90)), o.whole)) {
    draw(svg, "line", {x1: X(x), x2: X(x), y1: h - bottom, y2: h - bottom + 4, class: "axis"});
    draw(svg, "text", {x: X(x), y: h - bottom + 16, "text-anchor": "middle"}, figure(x));
  }
  (o.names || []).forEach((name, k) => draw(svg, "text", {x: X(k), y: h - bottom + 16, "text-anchor": "middle"}, name));
  draw(svg, o.bare ? "rect" : "line", o.bare ? {x: 1, y: 1, width: w - 2, height: h - 2, class: "border"}
    : {x1: edge, x2: w - right, y1: h - bottom, y2: h - bottom, class: "axis"});
  if (!o.bare) draw(svg, "text", {x: (edge + w - right) / 2, y: h - 3, "text-anchor": "middle", class: "label"}, o.x || "step");
  if (o.y) draw(svg, "text", {transform: `translate(11 ${(h - bottom + top) / 2}) rotate(-90)`, "text-anchor": "middle", class: "label"}, o.y);
  const at = event => { const b = svg.getBoundingClientRect(); return [(event.clientX - b.left) * w / b.width, (event.clientY - b.top) * h / b.height]; };
  return {box, svg, X, Y, at, h, top, bottom};
}
function hover(svg, told) {
  for (const kind of ["pointermove", "pointerdown"]) svg.addEventListener(kind, e => { const lines = told(e); lines ? show(e, lines) : hide(); });
  svg.addEventListener("pointerleave", hide);
}
const nearest = (points, far) => points.reduce((best, p) => { const d = far(p); return d < best[0] ? [d, p] : best; }, [Infinity, null]);
const shown = lines => lines.map((points, k) => ({k, points, name: data.runs[k]})).filter(l => l.points.length && !off.has(l.k));

function curve(host, o) {
  const lines = shown(o.lines), all = lines.flatMap(l => l.points);
  const f = frame(host, {title: o.title, xs: all.map(p => p[0]), ys: all.map(p => p[1]), whole: true});
  const marks = data.marks.filter(m => !off.has(m.run));
  for (const m of marks) mark(f, m);
  for (const l of lines) {
    const path = draw(f.svg, "polyline", {points: l.points.map(p => `${f.X(p[0]).toFixed(1)},${f.Y(p[1]).toFixed(1)}`).join(" "), class: "line"});
    path.style.stroke = colour(l.k);
    if (l.points.length < 40) for (const p of l.points) draw(f.svg, "circle", {cx: f.X(p[0]), cy: f.Y(p[1]), r: 2.4}).style.fill = colour(l.k);
  }
  const rule = draw(f.svg, "line", {y1: f.top, y2: f.h - f.bottom, class: "rule", visibility: "hidden"});
  f.svg.addEventListener("pointerleave", () => rule.setAttribute("visibility", "hidden"));
  hover(f.svg, event => {
    const [px] = f.at(event), near = nearest(all, p => Math.abs(f.X(p[0]) - px))[1];
    if (!near) return null;
    for (const end of ["x1", "x2"]) rule.setAttribute(end, f.X(near[0]));
    rule.setAttribute("visibility", "visible");
    const values = lines.map(l => [l, nearest(l.points, p => Math.abs(p[0] - near[0]))[1]]);
    return [`step ${near[0]}`, ...values.map(([l, p]) => `${l.name}: ${figure(p[1])}${p[0] === near[0] ? "" : ` (step ${p[0]})`}`),
      ...marks.filter(m => Math.abs(f.X(m.step) - px) < 6).slice(0, 4).map(m => `${kindly(m.kind)}, ${data.runs[m.run]}: ${m.words}`)];
  });
}
const kindly = kind => kind.replaceAll("_", " "), good = m => m.kind === "resume";
function mark(f, m) {
  const x = f.X(m.step), y = f.top - 4, kind = good(m) ? "resume" : "fault";
  draw(f.svg, "line", {x1: x, x2: x, y1: f.top, y2: f.h - f.bottom, class: `mark ${kind}`});
  draw(f.svg, "path", {d: good(m) ? `M${x - 4} ${y + 4}l4 -7l4 7z` : `M${x - 4} ${y}l4 -4l4 4l-4 4z`, class: `sign ${kind}`});
}
function plane(host, o) {
  const lines = shown(o.lines), all = lines.flatMap(l => l.points.map(p => [...p, l]));
  const f = frame(host, {title: `${o.y} against ${o.x}`, xs: all.map(p => p[0]), ys: all.map(p => p[1]), padx: .05, x: `${o.x} (left: more spread)`, y: `${o.y} (down: closer)`, square: true});
  for (const l of lines) {
    const places = l.points.map(p => [f.X(p[0]), f.Y(p[1])]), [ex, ey] = places[places.length - 1];
    draw(f.svg, "polyline", {points: places.map(p => p.map(v => v.toFixed(1)).join(",")).join(" "), class: "line"}).style.stroke = colour(l.k);
    places.forEach((p, i) => { const dot = draw(f.svg, "circle", {cx: p[0], cy: p[1], r: 2.2, opacity: .35 + .65 * i / places.length}); dot.style.fill = colour(l.k); });
    const end = draw(f.svg, "circle", {cx: ex, cy: ey, r: 6, class: "end"});
    end.style.fill = colour(l.k);
    draw(f.svg, "text", {x: ex, y: ey - 10, "text-anchor": ex > f.X(range(all.map(p => p[0]), 0)[1]) - 40 ? "end" : "middle", class: "label"}, `step ${l.points[l.points.length - 1][2]}`);
  }
  hover(f.svg, event => {
    const [px, py] = f.at(event), [far, p] = nearest(all, q => Math.hypot(f.X(q[0]) - px, f.Y(q[1]) - py));
    return p && far < 30 ? [p[3].name, `to step ${p[2]}`, `${o.x}: ${figure(p[0])}`, `${o.y}: ${figure(p[1])}`] : null;
  });
}
function legend(host, kinds) {
  const bar = host.appendChild(make("div", {class: "legend"}));
  data.runs.forEach((name, k) => {
    const button = bar.appendChild(make("button", {type: "button", "aria-pressed": String(!off.has(k)), title: "show or hide"}));
    button.appendChild(make("span", {class: "swatch"})).style.background = colour(k);
    button.append(cut(name, 60));
    button.addEventListener("click", () => { off.has(k) ? off.delete(k) : off.add(k); lines(); });
  });
  if (!kinds) return;
  for (const [kind, sign] of [["resume", "▲ went on"], ["fault", "◆ stop or fault"]])
    if (data.marks.some(m => good(m) === (kind === "resume"))) bar.appendChild(make("span", {class: `said ${kind}`}, sign));
}
function lines() {
  for (const [id, each, list, kinds] of [["curves", curve, data.curves, true], ["plane", plane, data.planes, false]]) {
    const host = place(id);
    host.replaceChildren();
    if (!list.length) { host.appendChild(make("p", {class: "note"}, "No step holds what is drawn here.")); continue; }
    legend(host, kinds);
    const grid = host.appendChild(make("div", {class: id === "plane" ? "pair" : "grid"}));
    for (const o of list) each(grid, o);
  }
}

// How a column colours its scans: fill of scan i, words for it, and what its legend shows.
function shading(column) {
  const {values, levels, kind, name} = column, missing = "var(--missing)";
  if (kind === "number") {
    const [low, high] = range(values.filter(v => v !== null), 0);
    return {fill: i => values[i] === null ? missing : `rgb(${ramp((values[i] - low) / (high - low))})`,
      words: i => `${name}: ${values[i] === null ? "missing" : figure(values[i])}`, low, high, gaps: values.filter(v => v === null).length};
  }
  const counts = levels.map((_, k) => values.filter(v => v === k).length);
  const order = levels.map((_, k) => k).filter(k => counts[k]).sort((a, b) => counts[b] - counts[a]);
  const rank = new Map(order.map((k, r) => [k, r])), tone = r => r < NAMED ? colour(r) : "var(--other)";
  const entries = order.slice(0, NAMED).map((k, r) => [tone(r), `${levels[k]} (${counts[k]})`]);
  if (order.length > NAMED) entries.push(["var(--other)", `${order.length - NAMED} others`]);
  return {fill: i => values[i] === null ? missing : tone(rank.get(values[i])),
    words: i => `${name}: ${values[i] === null ? "missing" : levels[values[i]]}`, entries, gaps: values.filter(v => v === null).length};
}
function scale(host, low, high, words, gaps = 0) {
  const bar = host.appendChild(make("div", {class: "legend scale"}));
  bar.appendChild(make("span", {}, `${words} ${figure(low)}`));
  const svg = bar.appendChild(make("svg", {viewBox: "0 0 160 12", class: "bar", role: "img", "aria-label": `colours from ${figure(low)} to ${figure(high)}`}, "", SVG));
  for (let k = 0; k < 80; k++) draw(svg, "rect", {x: 2 * k, y: 0, width: 2.5, height: 12, fill: `rgb(${ramp(k / 79)})`});
  bar.appendChild(make("span", {}, figure(high)));
  if (gaps) key(bar, "var(--missing)", `missing (${gaps})`);
}
function key(bar, fill, words) {
  const entry = bar.appendChild(make("span", {class: "said"}));
  entry.appendChild(make("span", {class: "swatch"})).style.background = fill;
  entry.append(cut(words, 40));
}
function scatter(host, title, points, map, shade) {
  const f = frame(host, {title, xs: points.map(p => p[0]), ys: points.map(p => p[1]), padx: .04, bare: true, square: true});
  points.forEach((p, i) => {
    const out = map.parts[i] === "held out";
    const dot = draw(f.svg, "circle", {cx: f.X(p[0]).toFixed(1), cy: f.Y(p[1]).toFixed(1), r: points.length > 600 ? 2.6 : 4, class: out ? "dot held" : "dot"});
    dot.style.fill = shade.fill(i);
  });
  hover(f.svg, event => {
    const [px, py] = f.at(event), [far, i] = nearest(points.map((_, k) => k), k => Math.hypot(f.X(points[k][0]) - px, f.Y(points[k][1]) - py));
    if (far > 14) return null;
    return [`subject ${map.hashes[i]} (${map.parts[i]})`, ...map.columns.map(c => shading(c).words(i))];
  });
}
function menu(host, words, names, value, act) {
  const label = host.appendChild(make("label", {}, words)), select = label.appendChild(make("select", {"aria-label": words}));
  names.forEach((name, k) => { const option = select.appendChild(make("option", {value: k}, cut(name, 60))); option.selected = k === value; });
  select.addEventListener("change", () => act(Number(select.value)));
}
function maps() {
  const hosts = ["map", "weights", "pairs"].map(place), there = data.maps.map((m, k) => k).filter(k => !data.maps[k].why);
  hosts.forEach(host => host.replaceChildren());
  if (!there.length) { hosts.forEach(host => host.appendChild(make("p", {class: "note"}, data.maps.map(m => m.why).join(" ")))); return; }
  if (!there.includes(chosen.run)) chosen.run = there[0];
  const map = data.maps[chosen.run], names = map.columns.map(c => c.name);
  const at = Math.max(0, names.indexOf(chosen.column)), run = data.runs[chosen.run];
  const bar = hosts[0].appendChild(make("div", {class: "legend"}));
  menu(bar, "run ", there.map(k => data.runs[k]), there.indexOf(chosen.run), k => { chosen.run = there[k]; maps(); });
  if (names.length) menu(bar, "coloured by ", names, at, k => { chosen.column = names[k]; maps(); });
  const shade = names.length ? shading(map.columns[at]) : {fill: () => colour(0)};
  if (shade.entries) {
    const keys = hosts[0].appendChild(make("div", {class: "legend"}));
    shade.entries.forEach(([fill, words]) => key(keys, fill, words));
    if (shade.gaps) key(keys, "var(--missing)", `missing (${shade.gaps})`);
  } else if (names.length) scale(hosts[0], shade.low, shade.high, names[at], shade.gaps);
  const grid = hosts[0].appendChild(make("div", {class: "pair"}));
  if (map.pca) scatter(grid, `PCA: two components of ${(100 * map.explained).toFixed(0)} % of the variance`, map.pca, map, shade);
  if (map.tsne) scatter(grid, "t-SNE: near is alike, far says nothing", map.tsne, map, shade);
  hosts[0].appendChild(make("p", {class: "note"}, `h of ${map.hashes.length} of ${map.whole} scans by ${run}, step ${map.step}; ringed: held out from training.`));
  weights(hosts[1], map.kernel, run);
  pairs(hosts[2], map.pairs, names[at], run);
}
function weights(host, kernel, run) {
  if (kernel.why) { host.appendChild(make("p", {class: "note"}, `${run}: ${kernel.why}`)); return; }
  const n = kernel.n, raw = atob(kernel.w), canvas = make("canvas", {width: n, height: n, class: "matrix", role: "img", "aria-label": "weights of pairs"});
  const box = host.appendChild(make("figure", {class: "square"})), image = new ImageData(n, n);
  for (let k = 0; k < n * n; k++) image.data.set([...ramp(raw.charCodeAt(k) / 255), 255], 4 * k);
  canvas.getContext("2d").putImageData(image, 0, 0);
  box.appendChild(make("figcaption", {}, `w = ${kernel.title} of the first batch of ${run}, ordered by ${kernel.column}`));
  box.appendChild(canvas);
  scale(host, 0, 1, "w");
  host.appendChild(make("p", {class: "note"}, `${n} of the batch's ${kernel.of} scans; as the kernel gives it, before a loss normalises it.${kernel.watched ? " This objective does not learn from it: only the conditional terms that are watched are by it." : ""}`));
  hover(canvas, event => {
    const b = canvas.getBoundingClientRect(), place = v => Math.min(n - 1, Math.max(0, Math.floor(v * n)));
    const i = place((event.clientY - b.top) / b.height), j = place((event.clientX - b.left) / b.width);
    return [`w = ${figure(raw.charCodeAt(i * n + j) / 255)}`, `${kernel.column}: ${kernel.values[i]}, ${kernel.values[j]}`];
  });
}
function pairs(host, all, column, run) {
  const of = all.find(p => p.column === column);
  if (!of) { host.appendChild(make("p", {class: "note"}, `${run}: no pairs of held-out subjects whose ${column || "metadata"} is known.`)); return; }
  const named = typeof of.bins[0].x === "string", bins = of.bins.map((b, k) => ({...b, at: named ? k : b.x}));
  const f = frame(host.appendChild(make("div", {class: "pair"})), {title: `cosine similarity of z against the distance in ${column}`, xs: bins.map(b => b.at), padx: named ? .5 : .03,
    ys: bins.flatMap(b => [b.mean - b.sd, b.mean + b.sd]), x: named ? column : `difference in ${column}`, y: "similarity", names: named ? bins.map(b => b.x) : null});
  const place = (b, side) => `${f.X(b.at).toFixed(1)},${f.Y(b.mean + side * b.sd).toFixed(1)}`, tone = colour(chosen.run);
  if (named) for (const b of bins) draw(f.svg, "line", {x1: f.X(b.at), x2: f.X(b.at), y1: f.Y(b.mean - b.sd), y2: f.Y(b.mean + b.sd), class: "whisker"}).style.stroke = tone;
  else draw(f.svg, "polygon", {points: [...bins.map(b => place(b, 1)), ...bins.map(b => place(b, -1)).reverse()].join(" "), class: "band"}).style.fill = tone;
  if (!named) draw(f.svg, "polyline", {points: bins.map(b => place(b, 0)).join(" "), class: "line"}).style.stroke = tone;
  for (const b of bins) draw(f.svg, "circle", {cx: f.X(b.at), cy: f.Y(b.mean), r: 4}).style.fill = tone;
  hover(f.svg, event => {
    const b = nearest(bins, q => Math.abs(f.X(q.at) - f.at(event)[0]))[1];
    return [named ? b.x : `${column} differs by ${figure(b.x)}`, `similarity ${figure(b.mean)} ± ${figure(b.sd)}`, `${b.n} pairs`];
  });
  host.appendChild(make("p", {class: "note"}, `Pairs of ${of.subjects} held-out subjects, ${run}: mean and standard deviation${named ? "" : " in bins of as many pairs"}.`));
}

const told = {};
function live(text) {
  const next = JSON.parse(text), same = JSON.stringify([next.runs, next.curves, next.planes, next.marks]) === JSON.stringify([data.runs, data.curves, data.planes, data.marks]);
  const mapped = JSON.stringify(next.maps) === JSON.stringify(data.maps);
  for (const [id, html] of Object.entries(next.tables)) {
    if (told[id] !== html) document.querySelector(`#${id} .told`).innerHTML = html; // escaped by the server
    told[id] = html;
  }
  data = next;
  document.getElementById("made").textContent = `live: ${next.made}`;
  if (!same) lines();
  if (!mapped) maps();
}
async function poll() {
  try {
    const answer = await fetch("data.json", {cache: "no-store"});
    if (answer.ok) live(await answer.text());
    else document.getElementById("made").textContent = `the server answers ${answer.status}; what is shown is of ${data.made}`;
  } catch { document.getElementById("made").textContent = `the server is gone; what is shown is of ${data.made}`; }
  setTimeout(poll, 5000);
}
let width = 0;
function all() { width = document.documentElement.clientWidth; lines(); maps(); }
addEventListener("resize", () => { if (document.documentElement.clientWidth !== width) requestAnimationFrame(all); });
addEventListener("scroll", hide, {passive: true});
all();
if (data.live) poll();
