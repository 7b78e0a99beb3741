// Draws the curves of a report from the JSON beside them, and draws all again when the window changes.
// Knows nothing of how the numbers came to be. Sizes follow the window; nothing is fetched.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const tip = document.getElementById("tip");
const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const SVG = "http://www.w3.org/2000/svg";

function el(parent, name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  parent.appendChild(node);
  return node;
}

function number(value) {
  const size = Math.abs(value), figures = (v) => String(+v.toPrecision(4));
  if (size === 0) return "0";
  if (size >= 1e9 || size < 1e-3) return (+value.toPrecision(3)).toExponential().replace("e+", "e");
  if (size >= 1e6) return figures(value / 1e6) + "M";
  if (size >= 1e4) return figures(value / 1e3) + "k";
  return figures(value);
}

function ticks(low, high, about) {
  const raw = (high - low) / about;
  const base = 10 ** Math.floor(Math.log10(raw));
  const step = base * [1, 2, 5, 10].find((m) => m * base >= raw);
  const found = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-9; t += step) found.push(+t.toPrecision(12));
  return found;
}

function showTip(event, html) {
  tip.innerHTML = html;
  tip.style.visibility = "visible";
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 16 + box.width > innerWidth ? event.clientX - box.width - 12 : event.clientX + 16;
  tip.style.left = Math.max(6, left) + "px";
  tip.style.top = Math.max(6, Math.min(event.clientY + 14, innerHeight - box.height - 6)) + "px";
}
const hideTip = () => { tip.style.visibility = "hidden"; };
const escapeText = (text) => text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

function scales(panel, width, height) {
  const xs = panel.series.flatMap((s) => s.points.map((p) => p[0]));
  const ys = panel.series.flatMap((s) => s.points.map((p) => p[1]));
  let [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  if (x0 === x1) { x0 -= 0.5; x1 += 0.5; }
  if (y0 >= 0 && y0 < y1 * 0.5) y0 = 0;
  if (y0 === y1) { const pad = Math.abs(y0) * 0.1 || 0.5; y0 -= pad; y1 += pad; }
  const marks = ticks(y0, y1, 4), step = marks.length > 1 ? marks[1] - marks[0] : y1 - y0;
  y1 = Math.ceil(y1 / step - 1e-6) * step;
  y0 = Math.floor(y0 / step + 1e-6) * step;
  const left = 46, right = 10, top = 12, bottom = 24;
  const x = (v) => left + ((v - x0) / (x1 - x0)) * (width - left - right);
  const y = (v) => height - bottom - ((v - y0) / (y1 - y0)) * (height - top - bottom);
  return { x0, x1, y0, y1, x, y, left, right, top, bottom };
}

function drawAxes(svg, panel, s, width, height) {
  for (const t of ticks(s.y0, s.y1, 4)) {
    el(svg, "line", { class: "grid", x1: s.left, x2: width - s.right, y1: s.y(t), y2: s.y(t) });
    el(svg, "text", { class: "axis", x: s.left - 8, y: s.y(t) + 4, "text-anchor": "end" }, number(t));
  }
  for (const t of ticks(s.x0, s.x1, panel.stage === "rounds" ? 8 : Math.max(4, width / 95)).filter(Number.isInteger)) {
    el(svg, "text", { class: "axis", x: s.x(t), y: height - 6, "text-anchor": "middle" }, number(t));
  }
  for (const step of panel.stage === "pretraining" ? data.rounds : []) {
    if (step > s.x0 && step < s.x1) el(svg, "line", { class: "round", x1: s.x(step), x2: s.x(step), y1: s.top, y2: height - s.bottom });
  }
}

function drawChart(box, panel) {
  const width = Math.max(260, box.clientWidth), height = panel.series.length > 3 ? 250 : 190;
  const svg = box.querySelector("svg");
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const s = scales(panel, width, height);
  drawAxes(svg, panel, s, width, height);
  for (const line of panel.series) {
    const d = line.points.map((p, i) => `${i ? "L" : "M"}${s.x(p[0]).toFixed(1)} ${s.y(p[1]).toFixed(1)}`).join("");
    el(svg, "path", { d, stroke: `var(${line.colour})`, "stroke-width": line.points.length > 250 ? 1.1 : 1.8 });
    if (line.points.length < 30) {
      for (const p of line.points) el(svg, "circle", { cx: s.x(p[0]), cy: s.y(p[1]), r: 2.6, fill: `var(${line.colour})` });
    }
  }
  const cross = el(svg, "line", { class: "cross", y1: s.top, y2: height - s.bottom });
  const nearest = (points, x) => points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
  svg.onpointermove = (event) => {
    const rect = svg.getBoundingClientRect();
    const at = s.x0 + (((event.clientX - rect.left) / rect.width) * width - s.left) / (width - s.left - s.right) * (s.x1 - s.x0);
    const step = nearest(panel.series.map((l) => nearest(l.points, at)), at)[0];
    cross.setAttribute("x1", s.x(step));
    cross.setAttribute("x2", s.x(step));
    cross.style.visibility = "visible";
    const rows = panel.series.map((l) => `<i style="background:var(${l.colour})"></i>${escapeText(l.name)} <b>${number(nearest(l.points, step)[1])}</b>`);
    showTip(event, `${panel.stage === "rounds" ? "round" : "step"} ${step}<br>` + rows.join("<br>"));
  };
  svg.onpointerleave = () => { cross.style.visibility = "hidden"; hideTip(); };
}

const redraw = [() => document.querySelectorAll("[data-panel]").forEach((box) => drawChart(box, data.panels[+box.dataset.panel]))];
const drawAll = () => redraw.forEach((draw) => draw());
let lastWidth = 0;
new ResizeObserver(() => { if (root.clientWidth !== lastWidth) { lastWidth = root.clientWidth; drawAll(); } }).observe(root);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
addEventListener("beforeprint", drawAll);
