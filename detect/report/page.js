"use strict";
(() => {
  const el = id => document.getElementById(id);
  const levels = JSON.parse(el("levels").textContent);
  const rows = [...document.querySelectorAll("#worklist tbody tr")];
  const sections = new Map([...document.querySelectorAll("section.scan")].map(s => [s.dataset.scan, s]));
  const images = [...document.querySelectorAll("#viewer img")];
  const slider = el("slice");
  let scan = null, data = null, shown = 0;             // shown: index into data.pictures

  // Address: #scan=<id>&slice=<number>
  const asked = () => new URLSearchParams(location.hash.slice(1));

  function go() {
    const id = sections.has(asked().get("scan")) ? asked().get("scan") : rows[0].dataset.scan;
    if (id !== scan) open(id);
    const slice = parseInt(asked().get("slice"), 10);
    if (!isNaN(slice) && data.pictures.length) show(nearest(slice));
  }

  function open(id) {
    scan = id;
    for (const [name, section] of sections) section.hidden = name !== id;
    for (const row of rows) {
      if (row.dataset.scan === id) bringIntoList(row);
      row.querySelector("a").setAttribute("aria-current", row.dataset.scan === id);
      row.classList.toggle("chosen", row.dataset.scan === id);
    }
    data = JSON.parse(sections.get(id).querySelector("script").textContent);
    data.bySlice = new Map(data.slices.map(s => [s[0], s]));
    el("viewer").hidden = !data.slices.length;
    document.querySelector(".panels").hidden = !data.pictures.length;
    document.querySelector(".pick").hidden = document.querySelector(".keys").hidden = !data.pictures.length;
    el("none").hidden = data.pictures.length > 0 || !data.total;
    slider.max = Math.max(0, data.pictures.length - 1);
    for (const image of images) {
      image.style.aspectRatio = data.aspect;
      image.style.objectPosition = `${100 * image.dataset.panel / (images.length - 1)}% 0`;
    }
    const some = data.pictures.length && data.pictures.length < data.total;
    el("partial").textContent = some ? `${data.pictures.length} of ${data.total} pictures are in this page, reduced: its `
      + "key slices. The others are in the results folder." : "";
    if (el("band-key")) el("band-key").hidden = !data.compared;
    drawPlot();
    drawKeys();
    if (data.pictures.length) show(nearest(data.key[0]));
  }

  function bringIntoList(row) {                        // without moving the page
    const box = row.closest(".scroll"), head = row.closest("table").tHead.offsetHeight;
    const above = row.offsetTop - head, below = row.offsetTop + row.offsetHeight - box.clientHeight;
    if (above < box.scrollTop) box.scrollTop = above;
    else if (below > box.scrollTop) box.scrollTop = below;
  }

  function nearest(slice) {
    const distance = i => Math.abs(data.pictures[i][0] - slice);
    return data.pictures.reduce((best, _, i) => distance(i) < distance(best) ? i : best, 0);
  }

  const level = mm => `${Math.abs(mm)} mm ${mm < 0 ? "above" : "below"} the top`;      // whole: level_mm of words.py
  const said = ([number, , score, , mm]) => `slice ${number}, ${level(mm)}, score ${score}`;

  function show(index) {
    shown = index;
    const [number, picture] = data.pictures[index];
    for (const image of images) {
      image.src = "data:image/jpeg;base64," + picture;
      image.alt = `${image.dataset.title}, slice ${number}`;
    }
    const slice = data.bySlice.get(number);
    slider.value = index;
    slider.setAttribute("aria-valuetext", said(slice));
    el("said").textContent = said(slice);
    for (const button of el("keys").children) button.setAttribute("aria-pressed", Number(button.value) === number);
    const cursor = el("cursor"), x = xOf(slice);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
  }

  function moveTo(index) {
    show(Math.min(Math.max(index, 0), data.pictures.length - 1));
    const address = new URLSearchParams({scan, slice: data.pictures[shown][0]});
    history.replaceState(null, "", "#" + address);
  }

  // Scores along the slices, from below on the left to the top on the right
  const left = 40, top = 8, bottom = 104;
  let xOf = null;

  function add(parent, name, attributes, text) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  }

  function drawPlot() {
    const plot = el("plot"), projected = data.slices.filter(s => s[3]);
    plot.replaceChildren();
    if (!data.slices.length) return;
    const right = Math.max(plot.clientWidth, 260) - 8;
    plot.setAttribute("viewBox", `0 0 ${right + 8} 126`);
    const mm = data.slices.map(s => s[1]), far = Math.max(...mm), near = Math.min(...mm);
    const told = data.slices.map(s => s[4]);
    const high = Math.max(1e-9, ...projected.map(s => s[2]));
    xOf = s => left + (right - left) * (far - s[1]) / Math.max(far - near, 1e-9);
    const yOf = score => bottom - (bottom - top) * Math.min(score / high, 1);
    const at = (s, value) => `${xOf(s).toFixed(1)},${yOf(value).toFixed(1)}`;
    const band = data.compared ? levels.filter(([level]) => level >= near && level <= far) : [];
    const inside = band.map(([level, low, up]) => [[0, level], low, up]);
    if (inside.length > 1) {
      const edge = [...inside.map(([s, , up]) => at(s, up)), ...inside.reverse().map(([s, low]) => at(s, low))];
      add(plot, "polygon", {class: "band", points: edge.join(" ")});
    }
    add(plot, "line", {class: "axis", x1: left, x2: right, y1: bottom, y2: bottom});
    add(plot, "line", {id: "cursor", class: "cursor", x1: -9, x2: -9, y1: top, y2: bottom});
    add(plot, "polyline", {class: "line", points: projected.map(s => at(s, s[2])).join(" ")});
    for (const [number] of data.pictures) {
      const s = data.bySlice.get(number);
      add(plot, "circle", {class: "dot", cx: xOf(s), cy: yOf(s[2]), r: 3.5});
    }
    add(plot, "text", {x: left - 5, y: top + 8, "text-anchor": "end"}, high.toPrecision(2));
    add(plot, "text", {x: left - 5, y: bottom, "text-anchor": "end"}, "0");
    add(plot, "text", {x: left, y: bottom + 17}, level(Math.max(...told)));
    add(plot, "text", {x: right, y: bottom + 17, "text-anchor": "end"}, level(Math.min(...told)));
    const best = projected.reduce((a, b) => b[2] > a[2] ? b : a, projected[0] || [0, 0, 0, 0, 0]);
    plot.setAttribute("aria-label", `Scores of ${projected.length} slices from skull base to vertex; highest: ${said(best)}`);
  }

  function drawKeys() {
    el("keys").replaceChildren(...data.key.filter(n => data.pictures.some(p => p[0] === n)).map(number => {
      const button = document.createElement("button"), s = data.bySlice.get(number);
      button.type = "button";
      button.value = number;
      button.textContent = `${number} (score ${s[2]})`;
      button.addEventListener("click", () => moveTo(nearest(number)));
      return button;
    }));
  }

  el("plot").addEventListener("click", event => {
    if (!data.pictures.length) return;
    const x = event.clientX - el("plot").getBoundingClientRect().left;
    const distance = i => Math.abs(xOf(data.bySlice.get(data.pictures[i][0])) - x);
    moveTo(data.pictures.reduce((best, _, i) => distance(i) < distance(best) ? i : best, 0));
  });
  slider.addEventListener("input", () => moveTo(Number(slider.value)));
  el("down").addEventListener("click", () => moveTo(shown - 1));
  el("up").addEventListener("click", () => moveTo(shown + 1));
  function enlarge(image) {                            // and back; with null, what is large
    const panels = document.querySelector(".panels"), large = image?.closest("figure:not(.large)");
    for (const figure of panels.children) figure.classList.toggle("large", figure === large);
    panels.classList.toggle("large", Boolean(large));
    for (const one of images) one.setAttribute("aria-pressed", one.closest("figure") === large);
  }
  for (const image of images) image.addEventListener("click", () => enlarge(image));
  for (const row of rows) row.addEventListener("click", event => {
    if (event.target.closest("a")) return;
    location.hash = new URLSearchParams({scan: row.dataset.scan});
  });

  document.addEventListener("keydown", event => {
    if (event.target.id === "find" || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") enlarge(null);
    if (images.includes(event.target) && (event.key === "Enter" || event.key === " ")) {
      enlarge(event.target);
      event.preventDefault();
    }
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (step && data.pictures.length && event.target !== slider && !event.target.closest?.(".wide")) {
      moveTo(shown + step);
      event.preventDefault();
    }
    const move = {j: 1, k: -1}[event.key.toLowerCase()];
    if (move) {
      const visible = rows.filter(row => !row.hidden), now = visible.findIndex(row => row.dataset.scan === scan);
      const row = visible[Math.min(Math.max(now + move, 0), visible.length - 1)];
      if (row) location.hash = new URLSearchParams({scan: row.dataset.scan});
    }
  });

  if (el("find")) el("find").addEventListener("input", () => {
    const words = el("find").value.toLowerCase();
    for (const row of rows) row.hidden = !row.querySelector(".name").textContent.toLowerCase().includes(words);
  });
  window.addEventListener("hashchange", () => {
    go();
    if (window.innerWidth < 1000) el("detail").scrollIntoView();
  });
  window.addEventListener("resize", () => {
    drawPlot();
    if (data.pictures.length) show(shown);
  });
  go();
})();
