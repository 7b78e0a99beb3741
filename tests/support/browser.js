// What browser.py looks for on a page; each part is one expression, whose value is a list of what is wrong.

//// CUT_OFF
// Elements that are wider than their box or than the window.
(() => {
  const found = [], name = (e) => `${e.tagName}.${e.className.baseVal ?? e.className}: ${e.textContent.trim().slice(0, 60)}`;
  for (const e of document.body.querySelectorAll("*")) {
    const style = getComputedStyle(e), box = e.getBoundingClientRect();
    if (!box.width || style.visibility === "hidden" || style.clipPath !== "none" || e.closest("thead, .skip, svg")) continue;
    if (style.overflowX !== "visible" && e.scrollWidth > e.clientWidth + 1 && e.clientWidth) found.push(name(e));
    else if (box.right > innerWidth + 1 || box.left < -1) found.push(name(e));
    else if (style.textOverflow === "ellipsis") found.push(name(e));
  }
  if (document.documentElement.scrollWidth > innerWidth) found.push("the page scrolls sideways");
  return found;
})()

//// FAINT
// Texts whose contrast with what is behind them is below WCAG's 4.5 (3 for large ones).
(() => {
  const rgba = (text) => { const n = text.match(/[\d.]+/g).map(Number); return text.startsWith("color(srgb") ? [...n.slice(0, 3).map((v) => v * 255), n[3] ?? 1] : [...n.slice(0, 3), n[3] ?? 1]; };
  const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] + below[i] * (1 - top[3]));
  const behind = (e) => e ? over(rgba(getComputedStyle(e).backgroundColor), behind(e.parentElement)) : [255, 255, 255];
  const light = (c) => { const [r, g, b] = c.map((v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, style = getComputedStyle(e);
    if (!walk.currentNode.textContent.trim() || /SCRIPT|STYLE/.test(e.tagName) || !e.getBoundingClientRect().width || style.visibility === "hidden") continue;
    const ground = behind(e), ink = over(rgba(e.namespaceURI.endsWith("svg") ? style.fill : style.color), ground);
    const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) found.push(`${ratio.toFixed(2)} ${e.tagName}.${e.className.baseVal ?? e.className}: ${walk.currentNode.textContent.trim().slice(0, 40)}`);
  }
  return [...new Set(found)];
})()

//// NAMELESS
// What a screen reader would meet without a name.
[...document.querySelectorAll("img, button, input, canvas, svg[role], nav, section, table, a, summary")]
  .filter((e) => !(e.getAttribute("alt") || e.getAttribute("aria-label") || e.getAttribute("aria-labelledby") || e.textContent.trim() || e.labels?.length))
  .map((e) => e.outerHTML.slice(0, 80).toUpperCase())
