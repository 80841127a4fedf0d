"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

// ------------------------------------------------------------------------------------------------- arrays out of text
async function unpack(packed) {
  const text = atob(packed.data), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const { length, planes: count } = packed, out = new Uint8Array(4 * length);
  for (let p = 0; p < count; p++)
    for (let i = 0, from = p * length, to = 4 - count + p; i < length; i++, to += 4) out[to] = planes[from + i];
  return packed.type === "f4" ? new Float32Array(out.buffer) : new Int32Array(out.buffer);
}

// ------------------------------------------------------------------------------------------------------------ colours
const NEGATIVE = [196, 69, 47], NEUTRAL = [255, 255, 255], POSITIVE = [36, 103, 179], STRONG = [122, 62, 157];
const CODES = ["#ffffff", "#e0a03a", "#2f9e8f", "#9c4fb0", "#777777"];
const UNKNOWN = "#bbbbbb", STEPS = 64;

function mixed(a, b, share) {
  const [r, g, blue] = a.map((x, k) => Math.round(x + (b[k] - x) * share));
  return `rgb(${r},${g},${blue})`;
}
// From -1 to 1 in steps; few colours, so that neighbours are drawn at once.
const DIVERGING = Array.from({ length: 2 * STEPS + 1 }, (_, k) =>
  mixed(NEUTRAL, k < STEPS ? NEGATIVE : POSITIVE, Math.abs(k - STEPS) / STEPS));
const SEQUENTIAL = Array.from({ length: STEPS + 1 }, (_, k) => mixed(NEUTRAL, STRONG, k / STEPS));

// The value that all but one token in a hundred do not exceed: a few outliers leave the others their colours.
function most(values, of) {
  const step = Math.max(1, Math.floor(values.length / 50000)), found = [];
  for (let i = 0; i < values.length; i += step) {
    const x = of(values[i]);
    if (Number.isFinite(x) && x > 0) found.push(x);
  }
  found.sort((a, b) => a - b);
  return found.length ? found[Math.min(found.length - 1, Math.floor(0.99 * found.length))] : 1;
}

// A scale: place(value) in [-1, 1] or [0, 1], colour(value), and what its legend says at places.
function makeScale(kind, values) {
  if (kind === "codes") {
    const names = Object.entries(data.clips);
    return { kind, names, colour: (x) => (Number.isNaN(x) ? UNKNOWN : CODES[x] ?? UNKNOWN) };
  }
  const of = { diverging: Math.abs, ratio: (x) => Math.abs(Math.log(x)), low: (x) => -x, high: (x) => x }[kind];
  const top = most(values, of), signed = kind === "diverging" || kind === "ratio";
  const place = {
    diverging: (x) => x / top, ratio: (x) => Math.log(x) / top, low: (x) => -x / top, high: (x) => x / top,
  }[kind];
  const at = { diverging: (p) => p * top, ratio: (p) => Math.exp(p * top), low: (p) => -p * top, high: (p) => p * top }[kind];
  const colour = (x) => {
    if (Number.isNaN(x)) return UNKNOWN;
    const p = Math.min(1, Math.max(signed ? -1 : 0, place(x)));
    return signed ? DIVERGING[Math.round(p * STEPS) + STEPS] : SEQUENTIAL[Math.round(p * STEPS)];
  };
  return { kind, signed, at, colour };
}

const number = (x) => (Number.isNaN(x) ? "NaN" : !Number.isFinite(x) ? (x > 0 ? "inf" : "-inf") : String(+x.toPrecision(5)));
const bright = (css) => {
  const [r, g, b] = css[0] === "#" ? [1, 3, 5].map((k) => parseInt(css.slice(k, k + 2), 16)) : css.match(/\d+/g).map(Number);
  return 0.3 * r + 0.59 * g + 0.11 * b > 140;
};

// A canvas of so many CSS pixels, sharp on any screen.
function prepared(canvas, width, height) {
  const dense = window.devicePixelRatio || 1, context = canvas.getContext("2d");
  canvas.width = Math.round(width * dense);
  canvas.height = Math.round(height * dense);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  context.setTransform(dense, 0, 0, dense, 0, 0);
  return context;
}

function drawLegend() {
  const context = prepared($("legend"), 300, 40), scale = state.channel.scale;
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "top";
  if (scale.kind === "codes") {
    scale.names.forEach(([code, name], k) => {
      context.fillStyle = CODES[code];
      context.fillRect(4 + 74 * k, 6, 16, 14);
      context.strokeStyle = "#999";
      context.strokeRect(4.5 + 74 * k, 6.5, 15, 13);
      context.fillStyle = "#22303c";
      context.fillText(name, 24 + 74 * k, 7);
    });
    $("legend").setAttribute("aria-label", scale.names.map(([, name]) => name).join(", "));
    return;
  }
  const left = 20, width = 260, low = scale.signed ? -1 : 0;
  for (let x = 0; x < width; x++) {
    context.fillStyle = scale.colour(scale.at(low + ((1 - low) * x) / (width - 1)));
    context.fillRect(left + x, 4, 1, 14);
  }
  context.strokeStyle = "#999";
  context.strokeRect(left - 0.5, 3.5, width + 1, 15);
  context.fillStyle = "#22303c";
  context.textAlign = "center";
  const ticks = scale.signed ? [-1, -0.5, 0, 0.5, 1] : [0, 0.5, 1];
  for (const p of ticks) context.fillText(String(+scale.at(p).toPrecision(2)), left + (width * (p - low)) / (1 - low), 23);
  $("legend").setAttribute("aria-label", `${state.channel.name}: ${ticks.map((p) => number(scale.at(p))).join(", ")}`);
}

// ------------------------------------------------------------------------------------------------------------- layout
const FONT = '14px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace';
const LINE = 22, MARGIN = 10, LONGEST = 80;
const state = { row: 0, token: 0, hovered: -1, channel: null };
let batch, layout;

function visible(text) {
  const shown = text.replace(/\r?\n/g, "\u23ce").replace(/\t/g, "\u21e5").replace(/[\u0000-\u001f\u007f]/g, "\ufffd");
  return shown.length > LONGEST ? `${shown.slice(0, LONGEST)}\u2026` : shown || "\u2205";
}

function measureVocabulary() {
  const context = $("lines").getContext("2d"), { ids, texts } = data.vocabulary;
  context.font = FONT;
  batch.shown = texts ? texts.map(visible) : ids.map((id) => String(id));
  const gap = texts ? 0 : 6;  // ids would run together
  batch.widths = Float32Array.from(batch.shown, (text) => context.measureText(text).width + gap);
  batch.breaks = Uint8Array.from(batch.shown, (_, k) => (texts && texts[k].includes("\n") ? 1 : 0));
}

// Lines: the first token of each and its sequence; a sequence begins with a line for its heading (token -1).
function makeLayout(width) {
  const first = [], rowOf = [], headOf = new Int32Array(batch.rows);
  const room = width - 2 * MARGIN, { tokens, starts, widths, breaks } = batch;
  for (let row = 0; row < batch.rows; row++) {
    headOf[row] = first.length;
    first.push(-1);
    rowOf.push(row);
    let x = Infinity;
    for (let i = starts[row]; i < starts[row + 1]; i++) {
      const wide = widths[tokens[i]];
      if (x + wide > room) {
        first.push(i);
        rowOf.push(row);
        x = 0;
      }
      x = breaks[tokens[i]] ? Infinity : x + wide;
    }
  }
  layout = { width, first: Int32Array.from(first), rowOf: Int32Array.from(rowOf), headOf };
  $("height").style.height = `${(first.length + 1) * LINE}px`;
}

// The tokens of a line are [first, end).
function lineEnd(line) {
  const next = line + 1, row = layout.rowOf[line];
  return next < layout.first.length && layout.rowOf[next] === row ? layout.first[next] : batch.starts[row + 1];
}

function lineOf(token, row) {
  let low = layout.headOf[row], high = row + 1 < batch.rows ? layout.headOf[row + 1] - 1 : layout.first.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (layout.first[middle] <= token) low = middle;
    else high = middle - 1;
  }
  return low;
}

function rowOfToken(token) {
  let low = 0, high = batch.rows - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (batch.starts[middle] <= token) low = middle;
    else high = middle - 1;
  }
  return low;
}

// The selected token; -1 in a sequence that has none.
const current = () => (state.token < batch.starts[state.row + 1] ? state.token : -1);

function heading(row) {
  const group = data.groups.names[batch.groupOf[row]], reward = data.rewards ? `   reward ${number(data.rewards[row])}` : "";
  const tokens = batch.starts[row + 1] - batch.starts[row];
  return `sequence ${row}${group ? `   group ${group}` : ""}${reward}   ${tokens} tokens`;
}

// ------------------------------------------------------------------------------------------------------------ drawing
let waiting = false;
function draw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    drawLines();
  });
}

function drawLines() {
  const box = $("text"), width = box.clientWidth, height = box.clientHeight;
  if (width !== layout.width) makeLayout(width);
  const context = prepared($("lines"), width, height), top = box.scrollTop;
  context.font = FONT;
  context.textBaseline = "middle";
  const begin = Math.floor(top / LINE), end = Math.min(layout.first.length, Math.ceil((top + height) / LINE));
  for (let line = begin; line < end; line++) drawLine(context, line, line * LINE - top);
}

function drawLine(context, line, y) {
  const first = layout.first[line], middle = y + LINE / 2;
  if (first < 0) {
    context.fillStyle = layout.rowOf[line] === state.row ? "#2467b3" : "#5c6b78";
    context.font = "600 12px system-ui, sans-serif";
    context.fillText(heading(layout.rowOf[line]), MARGIN, middle + 3);
    context.font = FONT;
    return;
  }
  const { tokens, widths, shown, counted } = batch, { numbers, scale } = state.channel;
  const selected = current();
  let x = MARGIN;
  for (let i = first, end = lineEnd(line); i < end; i++) {
    const wide = widths[tokens[i]];
    if (counted[i]) {
      const colour = scale.colour(numbers[i]);
      context.fillStyle = colour;
      context.fillRect(x, y + 2, wide, LINE - 4);
      context.fillStyle = bright(colour) ? "#22303c" : "#ffffff";
    } else context.fillStyle = "#9aa5af";
    context.fillText(shown[tokens[i]], x, middle);
    if (i === selected || i === state.hovered) {
      context.strokeStyle = i === selected ? "#000000" : "#5c6b78";
      context.lineWidth = i === selected ? 2 : 1;
      context.strokeRect(x, y + 2, wide, LINE - 4);
    }
    x += wide;
  }
}

// -------------------------------------------------------------------------------------------------------------- panel
function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function makeTable() {
  batch.channels.forEach((channel, k) => {
    const line = element("tr"), button = element("button", channel.name);
    channel.number = element("td", "", "number");
    channel.strip = element("canvas");
    channel.line = line;
    button.onclick = () => choose(k);
    channel.strip.onclick = (event) => {
      const count = batch.starts[state.row + 1] - batch.starts[state.row];
      select(batch.starts[state.row] + Math.min(count - 1, Math.floor((event.offsetX / 170) * count)));
    };
    const name = element("td"), strip = element("td", undefined, "strip");
    name.append(button);
    strip.append(channel.strip);
    line.append(name, channel.number, strip);
    $("values").tBodies[0].append(line);
    $("channel").append(new Option(channel.name, k));
  });
}

// The whole sequence in 170 pixels: of the tokens at a pixel the one furthest from no colour.
function drawStrips() {
  const begin = batch.starts[state.row], count = batch.starts[state.row + 1] - begin, wide = 170;
  for (const channel of batch.channels) {
    const context = prepared(channel.strip, wide, 14), { numbers, scale } = channel;
    for (let x = 0; x < wide && count; x++) {
      const from = begin + Math.floor((x * count) / wide), to = Math.max(from + 1, begin + Math.floor(((x + 1) * count) / wide));
      let best = NaN, far = -1;
      for (let i = from; i < to; i++) {
        const away = scale.kind === "ratio" ? Math.abs(Math.log(numbers[i])) : Math.abs(numbers[i]);
        if (batch.counted[i] && away > far) [best, far] = [numbers[i], away];
      }
      context.fillStyle = far < 0 ? "#eef1f4" : scale.colour(best);
      context.fillRect(x, 0, 1, 14);
    }
    const at = count ? ((state.token - begin + 0.5) / count) * wide : 0;
    context.fillStyle = "#000000";
    context.fillRect(Math.round(at), 0, 1, 14);
  }
}

function shownValue(channel, i) {
  if (!batch.counted[i]) return "";
  const x = channel.numbers[i];
  return channel.scale.kind === "codes" ? (data.clips[x] ?? number(x)) : number(x);
}

function showToken(i) {
  const panel = $("token");
  panel.replaceChildren();
  if (i < 0) {
    for (const channel of batch.channels) channel.number.textContent = "";
    return panel.append("no token");
  }
  const row = rowOfToken(i), { ids, texts } = data.vocabulary, k = batch.tokens[i];
  panel.append(element("b", texts ? visible(texts[k]) : String(ids[k])), element("br"));
  panel.append(`token ${ids[k]} at position ${i - batch.starts[row]} of sequence ${row}`);
  if (!batch.counted[i]) panel.append(element("br"), "masked out");
  for (const channel of batch.channels) channel.number.textContent = shownValue(channel, i);
}

// --------------------------------------------------------------------------------------------------------------- tree
const LEAF = 15, TREE_WIDTH = 370, MOST_NODES = 3000;

// The nodes of the group of the current sequence; null where there is no tree, or too large a one.
function groupNodes() {
  const tree = batch.tree;
  let root = tree.leaf[state.row];
  while (tree.parent[root] >= 0) root = tree.parent[root];
  let end = root + 1;
  while (end < tree.parent.length && tree.parent[end] >= 0) end++;
  return [root, end];
}

// A node's colour is that of the mean over the tokens that lie on it, in all its sequences.
function nodeMean(n, numbers) {
  const tree = batch.tree;
  let sum = 0, count = 0;
  for (let k = tree.row_begin[n]; k < tree.row_begin[n] + tree.count[n]; k++) {
    const begin = batch.starts[tree.order[k]] + tree.edge_start[n];
    for (let i = begin; i < begin + tree.edge_length[n]; i++)
      if (batch.counted[i] && !Number.isNaN(numbers[i])) [sum, count] = [sum + numbers[i], count + 1];
  }
  return count ? sum / count : NaN;
}

function placeNodes([root, end]) {
  const tree = batch.tree, y = new Float32Array(end - root).fill(NaN), low = y.slice(), high = y.slice();
  const endsAt = new Set();
  for (let k = tree.row_begin[root]; k < tree.row_begin[root] + tree.count[root]; k++) endsAt.add(tree.leaf[tree.order[k]]);
  let slots = 0;
  for (let n = root; n < end; n++) if (endsAt.has(n)) low[n - root] = high[n - root] = slots++;
  for (let n = end - 1; n >= root; n--) {
    const k = n - root, p = tree.parent[n] - root;
    y[k] = (low[k] + high[k]) / 2;
    if (n === root) break;
    low[p] = Number.isNaN(low[p]) ? y[k] : Math.min(low[p], y[k]);
    high[p] = Number.isNaN(high[p]) ? y[k] : Math.max(high[p], y[k]);
  }
  return { y, slots };
}

function drawTree() {
  if (!batch.tree) return;
  const tree = batch.tree, [root, end] = groupNodes(), name = data.groups.names[batch.groupOf[state.row]];
  $("tree-title").textContent = `tree${name ? ` of group ${name}` : ""}: ${tree.count[root]} sequences, ${end - root} nodes`;
  if (end - root > MOST_NODES) {
    $("tree-title").textContent += `, more than the ${MOST_NODES} that are drawn`;
    prepared($("branches"), 1, 1);
    batch.edges = [];
    return;
  }
  const { y, slots } = placeNodes([root, end]);
  const context = prepared($("branches"), TREE_WIDTH, slots * LEAF + 8);
  let longest = 1;
  for (let n = root; n < end; n++) longest = Math.max(longest, tree.edge_start[n] + tree.edge_length[n]);
  const across = (t) => 6 + (t / longest) * (TREE_WIDTH - 12), down = (n) => 4 + (y[n - root] + 0.5) * LEAF;
  const here = state.token - batch.starts[state.row], path = new Set();
  for (let n = tree.leaf[state.row]; n >= 0; n = tree.parent[n]) path.add(n);
  batch.edges = [];
  for (let n = root + 1; n < end; n++) {
    const left = across(tree.edge_start[n]), right = across(tree.edge_start[n] + tree.edge_length[n]), at = down(n);
    context.lineWidth = 1;
    context.strokeStyle = path.has(n) ? "#22303c" : "#b4bdc6";
    context.beginPath();
    context.moveTo(left, down(tree.parent[n]));
    context.lineTo(left, at);
    context.stroke();
    context.fillStyle = state.channel.scale.kind === "codes" ? UNKNOWN : state.channel.scale.colour(nodeMean(n, state.channel.numbers));
    context.fillRect(left, at - 4, Math.max(1, right - left), 8);
    context.strokeRect(left, at - 4, Math.max(1, right - left), 8);
    batch.edges.push({ n, left, right, at });
    const inside = here - tree.edge_start[n];
    if (path.has(n) && inside >= 0 && inside < tree.edge_length[n]) {
      context.fillStyle = "#000000";
      context.fillRect(across(here + 0.5) - 1, at - 6, 2, 12);
    }
  }
}

function clickTree(event) {
  const { offsetX: x, offsetY: y } = event, tree = batch.tree;
  const hit = batch.edges.find((e) => Math.abs(e.at - y) <= LEAF / 2 && x >= e.left - 2 && x <= e.right + 2);
  if (!hit) return;
  const share = Math.min(1, Math.max(0, (x - hit.left) / (hit.right - hit.left || 1))), length = tree.edge_length[hit.n];
  const rows = Array.from(tree.order.slice(tree.row_begin[hit.n], tree.row_begin[hit.n] + tree.count[hit.n]));
  const row = rows.includes(state.row) ? state.row : Math.min(...rows);
  select(batch.starts[row] + tree.edge_start[hit.n] + Math.min(length - 1, Math.floor(share * length)));
}

// ---------------------------------------------------------------------------------------------------------- selection
function select(token, row = rowOfToken(token)) {
  if (!batch.rows) return;
  state.row = Math.min(Math.max(row, 0), batch.rows - 1);
  state.token = token;
  state.hovered = -1;
  $("row").value = state.row;
  const line = lineOf(token, state.row), box = $("text");
  if (line * LINE < box.scrollTop + LINE) box.scrollTop = (line - 1) * LINE;
  else if ((line + 1) * LINE > box.scrollTop + box.clientHeight) box.scrollTop = (line + 2) * LINE - box.clientHeight;
  refresh();
}

function choose(k) {
  state.channel = batch.channels[(k + batch.channels.length) % batch.channels.length];
  state.channel.line.scrollIntoView({ block: "nearest" });
  refresh();
}

function refresh() {
  $("channel").value = batch.channels.indexOf(state.channel);
  for (const channel of batch.channels) channel.line.className = channel === state.channel ? "chosen" : "";
  showToken(current());
  drawLegend();
  drawStrips();
  drawTree();
  draw();
  clearTimeout(linking);  // browsers refuse too many changes of an address
  linking = setTimeout(link, 200);
}

let linking = 0;
// Makes the address one of this token.
function link() {
  const position = state.token - batch.starts[state.row];
  history.replaceState(null, "", `#channel=${encodeURIComponent(state.channel.name)}&sequence=${state.row}&token=${position}`);
}

function selectRow(row) {
  const to = Math.min(Math.max(row, 0), batch.rows - 1);
  select(batch.starts[to], to);
}

// By lines: to the token that is below (above) this one, over headings.
function moveLines(count) {
  const step = Math.sign(count), line = lineOf(state.token, state.row);
  let x = 0, to = line;
  for (let i = Math.max(layout.first[line], 0); i < state.token; i++) x += batch.widths[batch.tokens[i]];
  for (let left = Math.abs(count); left > 0; left--) {
    let next = to + step;
    while (layout.first[next] === -1) next += step;
    if (layout.first[next] === undefined) break;
    to = next;
  }
  if (to !== line) select(tokenAt(to, x));
}

// The token of a line that is so many pixels from its beginning.
function tokenAt(line, x) {
  let i = layout.first[line];
  for (const last = lineEnd(line) - 1; i < last && x >= batch.widths[batch.tokens[i]]; i++) x -= batch.widths[batch.tokens[i]];
  return i;
}

function tokenUnder(event) {
  const line = Math.floor(($("text").scrollTop + event.offsetY) / LINE);
  if (!(layout.first[line] >= 0) || event.offsetX < MARGIN) return -1;
  return tokenAt(line, event.offsetX - MARGIN);
}

const KEYS = {
  ArrowRight: () => state.token + 1 < batch.tokens.length && select(state.token + 1),
  ArrowLeft: () => state.token > 0 && select(state.token - 1),
  ArrowDown: () => moveLines(1),
  ArrowUp: () => moveLines(-1),
  PageDown: () => moveLines(Math.max(1, Math.floor($("text").clientHeight / LINE) - 2)),
  PageUp: () => moveLines(-Math.max(1, Math.floor($("text").clientHeight / LINE) - 2)),
  Home: () => select(batch.starts[state.row], state.row),
  End: () => select(Math.max(batch.starts[state.row], batch.starts[state.row + 1] - 1), state.row),
  n: () => selectRow(state.row + 1),
  p: () => selectRow(state.row - 1),
  c: () => choose(batch.channels.indexOf(state.channel) + 1),
  C: () => choose(batch.channels.indexOf(state.channel) - 1),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input, select")) return;
  const digit = /^[1-9]$/.test(event.key) && Number(event.key) <= batch.channels.length;
  const act = digit ? () => choose(Number(event.key) - 1) : KEYS[event.key];
  if (!act || !batch.rows) return;
  event.preventDefault();
  act();
}

function followHash() {
  const wanted = new URLSearchParams(location.hash.slice(1)), channel = wanted.get("channel");
  state.channel = batch.channels.find((c) => c.name === channel) ?? state.channel;
  state.channel.line.scrollIntoView({ block: "nearest" });
  const row = Math.min(Math.max(parseInt(wanted.get("sequence")) || 0, 0), Math.max(batch.rows - 1, 0));
  const count = batch.rows ? batch.starts[row + 1] - batch.starts[row] : 0;
  const position = Math.min(Math.max(parseInt(wanted.get("token")) || 0, 0), Math.max(count - 1, 0));
  if (batch.rows) select(batch.starts[row] + position, row);
}

// -------------------------------------------------------------------------------------------------------------- start
async function read() {
  const [tokens, counted, lengths, groupOf] = await Promise.all(
    [data.tokens, data.counted, data.lengths, data.groups.of].map(unpack));
  const starts = new Int32Array(lengths.length + 1);
  lengths.forEach((length, row) => (starts[row + 1] = starts[row] + length));
  const channels = [];
  for (const { name, scale, numbers } of data.values) {
    const values = await unpack(numbers);
    channels.push({ name, numbers: values, scale: makeScale(scale, values) });
  }
  let tree = null;
  if (data.tree) {
    tree = {};
    for (const [name, packed] of Object.entries(data.tree)) tree[name] = await unpack(packed);
  }
  return { rows: lengths.length, tokens, counted, starts, groupOf, channels, tree };
}

async function main() {
  batch = await read();
  for (const { numbers } of data.values) numbers.data = "";  // the text is not needed any more
  measureVocabulary();
  makeTable();
  state.channel = batch.channels[0];
  makeLayout($("text").clientWidth);
  $("summary").textContent = `${batch.rows} sequences, ${batch.tokens.length} tokens`;
  $("row").max = batch.rows - 1;
  $("row").onchange = () => selectRow(Number($("row").value));
  $("channel").onchange = () => choose(Number($("channel").value));
  $("text").onscroll = draw;
  $("lines").onmousemove = (event) => {
    const token = tokenUnder(event);
    if (token === state.hovered) return;
    state.hovered = token;
    showToken(token < 0 ? current() : token);
    draw();
  };
  $("lines").onmouseleave = () => { state.hovered = -1; showToken(current()); draw(); };
  $("lines").onclick = (event) => { const token = tokenUnder(event); if (token >= 0) select(token); };
  $("branches").onclick = clickTree;
  document.onkeydown = onKey;
  window.onhashchange = followHash;
  window.onresize = draw;
  followHash();
  $("text").focus();
  if (!batch.rows) $("token").textContent = "no sequences";
}

main().catch((error) => ($("token").textContent = `this page can't be shown: ${error.message}`));
