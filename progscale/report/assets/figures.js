"use strict";
// Draws the figures that stand in the page as data. Colours are CSS variables, so light and dark need no second drawing.
(() => {
  const figures = JSON.parse(document.getElementById("figure-data").textContent);
  const colours = [1, 2, 3, 4, 5, 6, 7, 8].map((n) => `var(--s${n})`);
  const short = (value) => {
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size >= 1e4) return d3.format(".3~s")(value);
    if (size < 1e-3) return d3.format(".2~e")(value);
    return d3.format(".4~r")(value);
  };
  const ticks = (width) => Math.max(3, Math.floor(width / 90));
  const style = { fontSize: "12px", background: "none", overflow: "visible" };
  const widest = (labels) => Math.min(190, 14 + 6.6 * Math.max(0, ...labels.map((label) => label.length)));

  function legend(holder, names, range) {
    if (names.length < 2) return;
    const list = document.createElement("ul");
    list.className = "legend";
    names.forEach((name, index) => {
      const item = document.createElement("li");
      const chip = document.createElement("i");
      chip.style.background = range[index % range.length];
      item.append(chip, name);
      list.append(item);
    });
    holder.append(list);
  }

  // Words that would stand on each other are left out from the right on.
  const marksOf = (figure, width, total) => {
    let free = -Infinity;
    return figure.marks.map((mark) => {
      const place = (mark.x / Math.max(1, total)) * width;
      const shown = place >= free;
      if (shown) free = place + 7 * mark.text.length + 10;
      return { ...mark, shown };
    });
  };

  // A series keeps its colour from figure to figure where the page gives it one.
  const coloursOf = (figure) => figure.series.map((series, index) => colours[(series.colour ?? index) % colours.length]);

  function lines(figure, holder, width) {
    const names = figure.series.map((series) => series.name);
    const range = coloursOf(figure);
    legend(holder, names, range);
    const points = figure.series.flatMap((series) => series.points.map(([x, y]) => ({ x, y, name: series.name })));
    const dotted = new Set(figure.series.filter((series) => series.dots).map((series) => series.name));
    const total = d3.max(points, (point) => point.x);
    const marks = marksOf(figure, width - 70, total).filter((mark) => mark.x <= total);
    return Plot.plot({
      width, height: 270, marginLeft: 58, marginTop: 30, marginBottom: 42, style,
      x: { label: figure.x, labelAnchor: "center", labelArrow: "none", ticks: ticks(width), tickFormat: short, domain: [0, total], nice: false },
      y: { label: figure.y, labelArrow: "none", grid: true, nice: true, tickFormat: short, type: figure.logarithmic ? "log" : "linear" },
      color: { domain: names, range },
      marks: [
        Plot.ruleX(marks, { x: "x", stroke: "var(--mark)", strokeDasharray: "3,3" }),
        Plot.text(marks.filter((mark) => mark.shown), { x: "x", text: "text", frameAnchor: "top", textAnchor: "start", dx: 4, dy: -2, fill: "var(--muted)", fontSize: 11 }),
        Plot.line(points, { x: "x", y: "y", stroke: "name", strokeWidth: 1.8 }),
        Plot.dot(points.filter((point) => dotted.has(point.name)), { x: "x", y: "y", fill: "name", r: 3.2 }),
        Plot.tip(points, Plot.pointerX({ x: "x", y: "y", stroke: "name", title: (p) => `${p.name}\n${figure.x} ${p.x}\n${figure.y}: ${short(p.y)}` })),
      ],
    });
  }

  function bars(figure, holder, width) {
    const names = figure.series.map((series) => series.name);
    const range = coloursOf(figure);
    legend(holder, names, range);
    const cells = figure.series.flatMap((series) => series.values
      .map((y, index) => ({ y, name: series.name, group: figure.groups[index] })).filter((cell) => cell.y !== null));
    // Words of a group break into lines where they have no room.
    const em = Math.max(3, (width - 70) / figure.groups.length / 11);
    const deepest = Math.max(...figure.groups.map((group) => Math.ceil(group.length / (em * 1.7)))) - 1;
    const room = (width - 60) / Math.max(1, figure.groups.length * names.length);
    return Plot.plot({
      width, height: 250 + 14 * deepest, marginLeft: 58, marginTop: 30, marginBottom: 44 + 14 * deepest, style,
      fx: { label: figure.x, axis: null, domain: figure.groups, padding: 0.2 },
      x: { axis: null, domain: names, padding: 0.08 },
      y: { label: figure.y, labelArrow: "none", grid: true, nice: true, tickFormat: short },
      color: { domain: names, range },
      marks: [
        Plot.axisFx({ anchor: "bottom", label: figure.x, labelAnchor: "center", labelArrow: "none", lineWidth: em, labelOffset: 38 + 14 * deepest }),
        Plot.ruleY([0], { stroke: "var(--mark)" }),
        Plot.barY(cells, { fx: "group", x: "name", y: "y", fill: "name", title: (c) => `${figure.x} ${c.group}, ${c.name}\n${figure.y}: ${short(c.y)}`, tip: true }),
        room > 34 ? Plot.text(cells, { fx: "group", x: "name", y: "y", text: (c) => short(Number(c.y.toPrecision(3))), dy: -7, fontSize: 11, fill: "currentColor" }) : null,
      ],
    });
  }

  function shares(figure, holder, width) {
    const names = figure.parts.map((part) => part.name);
    const total = d3.sum(figure.parts, (part) => part.value);
    legend(holder, figure.parts.map((part) => `${part.name} ${short(Number(part.value.toPrecision(3)))} (${d3.format(".0%")(part.value / total)})`), colours);
    return Plot.plot({
      width, height: 92, marginLeft: 12, marginRight: 16, marginTop: 4, marginBottom: 42, style,
      x: { label: figure.x, labelAnchor: "center", labelArrow: "none", tickFormat: short, ticks: ticks(width), nice: false },
      color: { domain: names, range: colours },
      marks: [Plot.barX(figure.parts, Plot.stackX({ x: "value", fill: "name", order: names, title: (p) => `${p.name}\n${short(p.value)} ${figure.x}`, tip: true, inset: 0.5 }))],
    });
  }

  function timeline(figure, holder, width) {
    const names = ["trained", "frozen"];
    const range = ["var(--s1)", "var(--frozen)"];
    legend(holder, names, range);
    const total = d3.max(figure.cells, (cell) => cell.to);
    const row = Math.max(9, Math.min(22, 420 / figure.rows.length));
    const every = Math.ceil(13 / row);
    const left = widest(figure.rows) + 14;
    const marks = marksOf(figure, width - left - 20, total);
    return Plot.plot({
      width, height: row * figure.rows.length + 82, marginLeft: left, marginTop: 36, marginBottom: 46, marginRight: 20, style,
      x: { label: figure.x, labelAnchor: "center", labelArrow: "none", ticks: ticks(width - left), tickFormat: short, domain: [0, total] },
      y: { label: figure.y, labelArrow: "none", domain: [...figure.rows].reverse(), padding: 0.12, tickSize: 0,
        ticks: figure.rows.filter((_, index) => index % every === 0 || index === figure.rows.length - 1) },
      color: { domain: names, range },
      marks: [
        Plot.barX(figure.cells, { x1: "from", x2: "to", y: "row", fill: (c) => (c.trained ? "trained" : "frozen"), insetLeft: 0.7, insetRight: 0.7,
          title: (c) => `${c.row}\nstage ${c.stage}, steps ${c.from} to ${c.to - 1}\n${c.trained ? "trained" : "frozen"}`, tip: true }),
        Plot.text(marks.filter((mark) => mark.shown), { x: "x", text: "text", frameAnchor: "top", textAnchor: "start", dx: 2, dy: -14, fill: "var(--muted)", fontSize: 11 }),
      ],
    });
  }

  function intervals(figure, holder, width) {
    const names = [...new Set(figure.rows.map((row) => row.group))];
    legend(holder, names, colours);
    const labels = figure.rows.map((row) => row.label);
    const points = figure.rows.flatMap((row) => row.points.map((x) => ({ ...row, x })));
    const most = Math.floor((width - 30) / 6.4);
    // Names stand above their rows: beside them they would leave no room for the figure on a phone.
    return Plot.plot({
      width, height: 44 * labels.length + 68, marginLeft: 26, marginTop: 18, marginBottom: 46, marginRight: 20, style,
      x: { label: figure.x, labelAnchor: "center", labelArrow: "none", labelOffset: 38, grid: true, nice: true, ticks: ticks(width), tickFormat: short },
      y: { axis: null, domain: labels, label: figure.y },
      color: { domain: names, range: colours },
      marks: [
        figure.zero ? Plot.ruleX([0], { stroke: "var(--mark)", strokeWidth: 1.5 }) : null,
        Plot.text(figure.rows, { y: "label", text: (r) => (r.label.length > most ? `${r.label.slice(0, most - 1)}…` : r.label), frameAnchor: "left", textAnchor: "start", dy: -14, fontSize: 12, fill: "currentColor" }),
        Plot.ruleY(figure.rows.filter((row) => row.low !== null), { x1: "low", x2: "high", y: "label", stroke: "group", strokeWidth: 3, strokeOpacity: 0.55 }),
        Plot.dot(points, { x: "x", y: "label", stroke: "group", r: 3, strokeOpacity: 0.8 }),
        Plot.dot(figure.rows, { x: "mean", y: "label", fill: "group", r: 5 }),
        Plot.tip(figure.rows, Plot.pointerY({ x: "mean", y: "label", title: (r) => `${r.label}\n${figure.x}: ${short(r.mean)}` + (r.low === null ? "" : `\n${short(r.low)} to ${short(r.high)}`) })),
      ],
    });
  }

  const kinds = { lines, bars, shares, timeline, intervals };

  function draw(figure) {
    const holder = document.querySelector(`#${CSS.escape(figure.name)} .plot`);
    const width = Math.floor(holder.clientWidth);
    if (!width || Number(holder.dataset.width) === width) return;
    holder.dataset.width = width;
    holder.replaceChildren();
    holder.append(kinds[figure.kind](figure, holder, width));
  }

  const watcher = new ResizeObserver((entries) => {
    const seen = new Set(entries.map((entry) => entry.target.closest("figure").id));
    requestAnimationFrame(() => figures.filter((figure) => seen.has(figure.name)).forEach(draw));
  });
  for (const figure of figures) {
    draw(figure);
    watcher.observe(document.querySelector(`#${CSS.escape(figure.name)} .plot`));
  }
  document.documentElement.dataset.drawn = String(figures.length);
})();
