
// The confusion matrix on a canvas: a window of cells that moves and zooms, and one chosen cell.
// Everything the pointer can do the keyboard can; what is chosen is said in words beside the map.
function confusionMap({ classes, boundaries, streams }) {
  const box = document.getElementById("heat"), canvas = box.querySelector("canvas"), pen = canvas.getContext("2d");
  const said = document.getElementById("cell"), ofClass = document.getElementById("of-class");
  const size = classes.length, fewest = Math.min(size, 6);
  const parsed = {};
  let stream = Object.keys(streams).slice(-1)[0];
  let view = { row: 0, column: 0, span: size }, chosen = null, worst = -1, layout = null;

  // A stream's counts by cell, its clips by class, and its errors, most frequent first.
  function read(name) {
    if (parsed[name]) return parsed[name];
    const { gaps, counts } = streams[name], cells = [], byCell = new Map(), totals = new Array(size).fill(0);
    let at = 0;
    gaps.forEach((gap, i) => {
      at += gap;
      const cell = { row: Math.floor(at / size), column: at % size, n: counts[i] };
      cells.push(cell);
      byCell.set(at, cell.n);
      totals[cell.row] += cell.n;
    });
    const rate = (c) => c.n / totals[c.row];
    const errors = cells.filter((c) => c.row !== c.column).sort((a, b) => rate(b) - rate(a) || b.n - a.n);
    return (parsed[name] = { cells, byCell, totals, errors });
  }

  const clamp = (v, low, high) => Math.max(low, Math.min(high, v));
  function move(row, column, span = view.span) {
    span = clamp(span, fewest, size);
    view = { row: clamp(row, 0, size - span), column: clamp(column, 0, size - span), span };
    draw();
  }
  function zoom(factor, row = view.row + view.span / 2, column = view.column + view.span / 2) {
    const span = clamp(view.span * factor, fewest, size), share = span / view.span;
    move(row - (row - view.row) * share, column - (column - view.column) * share, span);
  }
  function show(cell) {
    let { row, column, span } = view;
    if (cell.row < row || cell.row >= row + span) row = cell.row + 0.5 - span / 2;
    if (cell.column < column || cell.column >= column + span) column = cell.column + 0.5 - span / 2;
    move(row, column);
  }
  function words({ row, column }) {
    const { byCell, totals } = read(stream), n = byCell.get(row * size + column) || 0;
    const share = totals[row] ? ((100 * n) / totals[row]).toFixed(1) : "0";
    return row === column ? `${classes[row]}: right, ${n} of ${totals[row]} (${share} %)` : `${classes[row]} taken for ${classes[column]}: ${n} of ${totals[row]} (${share} %)`;
  }
  function choose(cell, span) {
    chosen = cell;
    said.textContent = `${stream}: ${words(cell)}`;
    if (span) move(cell.row + 0.5 - span / 2, cell.column + 0.5 - span / 2, span);
    else show(cell);
  }

  function measure() {
    box.style.maxWidth = size <= 40 ? "760px" : "960px";
    const width = box.clientWidth;
    // Names stand beside the cells once they can be read.
    const named = (width * 0.72) / view.span >= 9;
    const font = clamp(((width * 0.72) / view.span) * 0.72, 9, 12.5);
    const longest = Math.max(...classes.map((name) => name.length));
    const gutter = named ? Math.min(width * 0.3, 14 + longest * font * 0.56) : 4;
    const side = width - gutter - 2;
    return { width, named, font, gutter, side, cell: side / view.span, height: side + gutter };
  }

  function draw() {
    layout = measure();
    const { width, height, gutter, side, cell } = layout, pixels = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * pixels);
    canvas.height = Math.round(height * pixels);
    canvas.style.height = `${height}px`;
    pen.setTransform(pixels, 0, 0, pixels, 0, 0);
    pen.fillStyle = css("--card");
    pen.fillRect(gutter, 0, side, side);
    pen.save();
    pen.beginPath();
    pen.rect(gutter - 1, 0, side + 2, side + 1);
    pen.clip();
    if (cell > 6) drawGrid();
    drawCells();
    drawMarks();
    pen.restore();
    pen.strokeStyle = css("--line");
    pen.strokeRect(gutter + 0.5, 0.5, side - 1, side - 1);
    if (layout.named) drawNames();
    canvas.dataset.view = [view.row, view.column, view.span].map((v) => v.toFixed(2)).join(" ");
  }
  const left = (column) => layout.gutter + (column - view.column) * layout.cell;
  const top = (row) => (row - view.row) * layout.cell;

  function drawGrid() {
    pen.fillStyle = css("--grid");
    for (let k = Math.ceil(view.column); k <= view.column + view.span; k++) pen.fillRect(left(k) - 1, 0, 1, layout.side);
    for (let k = Math.ceil(view.row); k <= view.row + view.span; k++) pen.fillRect(layout.gutter, top(k) - 1, layout.side, 1);
  }
  function drawCells() {
    const { cells, totals } = read(stream), gap = layout.cell > 6 ? 1 : 0;
    // A single clip of one class has to be seen among 95,000 cells: at least a pixel and a half.
    const drawn = Math.max(layout.cell - gap, 1.5), ink = { true: css("--heat-hit"), false: css("--heat-miss") };
    for (const c of cells) {
      const x = left(c.column), y = top(c.row);
      if (x + drawn < layout.gutter || y + drawn < 0 || x > layout.width || y > layout.side) continue;
      const rate = c.n / totals[c.row];
      pen.fillStyle = `rgba(${ink[c.row === c.column]}, ${0.12 + 0.88 * Math.sqrt(rate)})`;
      pen.fillRect(x, y, drawn, drawn);
      if (layout.cell >= 30) drawNumber(c.n, x + layout.cell / 2, y + layout.cell / 2, rate);
    }
  }
  function drawNumber(n, x, y, rate) {
    pen.fillStyle = rate > 0.35 ? css("--card") : css("--ink");
    pen.font = "12px system-ui, sans-serif";
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.fillText(n, x, y);
  }
  function drawMarks() {
    pen.lineWidth = layout.cell < 6 ? 0.6 : 1;
    pen.strokeStyle = css("--soft");
    const edges = [0, ...boundaries, size];
    edges.slice(1).forEach((end, i) => {
      const span = (end - edges[i]) * layout.cell;
      if (end - edges[i] > 1) pen.strokeRect(Math.round(left(edges[i])) - 0.5, Math.round(top(edges[i])) - 0.5, Math.round(span), Math.round(span));
    });
    if (!chosen) return;
    const x = left(chosen.column), y = top(chosen.row), side = Math.max(layout.cell, 3);
    pen.fillStyle = css("--band");
    pen.fillRect(layout.gutter, y, layout.side, side);
    pen.fillRect(x, 0, side, layout.side);
    pen.lineWidth = 2;
    pen.strokeStyle = css("--ink");
    pen.strokeRect(x - 1, y - 1, side + 1, side + 1);
  }
  function drawNames() {
    const { font, gutter, side, cell } = layout;
    pen.font = `${font}px system-ui, sans-serif`;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    const fit = (name) => { let t = name; while (t.length > 2 && pen.measureText(t).width > gutter - 12) t = t.slice(0, -2) + "…"; return t; };
    for (let k = Math.ceil(view.row - 0.5); k + 0.5 < view.row + view.span; k++) {
      pen.fillStyle = css(chosen && chosen.row === k ? "--ink" : "--soft");
      pen.fillText(fit(classes[k]), gutter - 8, top(k + 0.5));
    }
    for (let k = Math.ceil(view.column - 0.5); k + 0.5 < view.column + view.span; k++) {
      pen.fillStyle = css(chosen && chosen.column === k ? "--ink" : "--soft");
      pen.save();
      pen.translate(left(k + 0.5), side + 8);
      pen.rotate(-Math.PI / 2);
      pen.fillText(fit(classes[k]), 0, 0);
      pen.restore();
    }
  }

  // What a searched class is taken for, and what is taken for it.
  function tell(index) {
    const { byCell, totals, errors } = read(stream);
    const list = (title, cells, other, of) => {
      const rows = cells.slice(0, 8).map((c) => `<li><button class="link" data-cell="${c.row} ${c.column}">${escapeText(classes[other(c)])}</button> ${c.n} of ${of(c)}</li>`);
      return `<div><h4>${title}</h4>${rows.length ? `<ol>${rows.join("")}</ol>` : "<p>nothing</p>"}</div>`;
    };
    const right = byCell.get(index * size + index) || 0;
    ofClass.innerHTML = `<p><b>${escapeText(classes[index])}</b>, ${stream}: ${right} of ${totals[index]} right</p><div class="two">` +
      list("taken for", errors.filter((c) => c.row === index), (c) => c.column, (c) => totals[c.row]) +
      list("taken for it", errors.filter((c) => c.column === index), (c) => c.row, (c) => totals[c.row]) + "</div>";
    ofClass.dataset.index = index;
  }
  ofClass.onclick = (event) => {
    if (!event.target.dataset.cell) return;
    const [row, column] = event.target.dataset.cell.split(" ").map(Number);
    choose({ row, column });
  };

  const search = document.getElementById("find");
  search.oninput = search.onchange = (event) => {
    const wanted = search.value.trim().toLowerCase();
    if (!wanted) return;
    let index = classes.findIndex((name) => name.toLowerCase() === wanted);
    if (index < 0 && event.type === "change") index = classes.findIndex((name) => name.toLowerCase().includes(wanted));
    if (index >= 0) { choose({ row: index, column: index }, Math.min(size, 30)); tell(index); }
    else if (event.type === "change") said.textContent = `no class has "${search.value}" in its name`;
  };
  const buttons = [...document.querySelectorAll("[data-stream]")];
  buttons.forEach((button) => {
    button.onclick = () => {
      stream = button.dataset.stream;
      worst = -1;
      buttons.forEach((b) => b.setAttribute("aria-pressed", String(b === button)));
      if (chosen) said.textContent = `${stream}: ${words(chosen)}`;
      if (ofClass.dataset.index) tell(+ofClass.dataset.index);
      draw();
    };
  });
  const centre = () => (chosen ? [chosen.row + 0.5, chosen.column + 0.5] : []);
  const zooms = { in: () => zoom(0.6, ...centre()), out: () => zoom(1 / 0.6, ...centre()), all: () => move(0, 0, size) };
  document.querySelectorAll("[data-zoom]").forEach((button) => { button.onclick = zooms[button.dataset.zoom]; });
  document.querySelectorAll("[data-row]").forEach((button) => {
    button.onclick = () => {
      choose({ row: classes.indexOf(button.dataset.row), column: classes.indexOf(button.dataset.column) }, Math.min(size, 30));
      canvas.scrollIntoView({ block: "center" });
      canvas.focus({ preventScroll: true });
    };
  });

  function confused(by) {
    const { errors } = read(stream);
    if (!errors.length) return;
    worst = clamp(worst + by, 0, errors.length - 1);
    choose(errors[worst], Math.min(size, 30));
  }
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  canvas.onkeydown = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = steps[event.key], by = event.shiftKey ? 10 : 1, from = chosen || { row: Math.floor(view.row), column: Math.floor(view.column) };
    const other = { "+": zooms.in, "=": zooms.in, "-": zooms.out, 0: zooms.all, n: () => confused(1), p: () => confused(-1) }[event.key];
    if (step) choose(chosen ? { row: clamp(from.row + step[0] * by, 0, size - 1), column: clamp(from.column + step[1] * by, 0, size - 1) } : from);
    else if (other) other();
    else return;
    event.preventDefault();
  };

  function cellAt(event) {
    const rect = canvas.getBoundingClientRect();
    const column = Math.floor(view.column + (event.clientX - rect.left - layout.gutter) / layout.cell);
    const row = Math.floor(view.row + (event.clientY - rect.top) / layout.cell);
    const inside = event.clientX - rect.left > layout.gutter && event.clientY - rect.top < layout.side;
    return inside && row >= 0 && column >= 0 && row < size && column < size ? { row, column } : null;
  }
  let drag = null;
  canvas.onpointerdown = (event) => { drag = { x: event.clientX, y: event.clientY, row: view.row, column: view.column, moved: false }; canvas.setPointerCapture(event.pointerId); };
  canvas.onpointerup = (event) => { const cell = cellAt(event); if (drag && !drag.moved && cell) choose(cell); drag = null; };
  canvas.onpointermove = (event) => {
    if (drag && (drag.moved || Math.hypot(event.clientX - drag.x, event.clientY - drag.y) > 4)) {
      drag.moved = true;
      hideTip();
      return move(drag.row - (event.clientY - drag.y) / layout.cell, drag.column - (event.clientX - drag.x) / layout.cell);
    }
    const cell = cellAt(event);
    return cell ? showTip(event, escapeText(words(cell))) : hideTip();
  };
  canvas.onpointerleave = hideTip;
  canvas.addEventListener("wheel", (event) => {
    // Zoomed out, the wheel scrolls the page; it zooms where the map has the focus or is zoomed.
    const cell = cellAt(event);
    if (!cell || (document.activeElement !== canvas && !event.ctrlKey && view.span === size)) return;
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.2 : 1 / 1.2, cell.row + 0.5, cell.column + 0.5);
  }, { passive: false });
  redraw.push(draw);
}
if (data.confusion) confusionMap(data.confusion);
