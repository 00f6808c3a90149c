// Draws the charts of the page from the JSON in #charts: colours of the page's theme, an arm's button for all charts,
// zoom by dragging or by pinching.
"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const places = charts.map((_, index) => document.getElementById(`chart-${index}`));
  const buttons = [...document.querySelectorAll(".legend button")];
  const seeds = document.getElementById("seed");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)");
  const hidden = new Set();

  // Below τ from the first to the second, above it from the third to the last.
  const SCALE = ["#eef3f7", "#3f7fb0", "#ffd166", "#e4572e", "#7d1128"];
  const DARK_SCALE = ["#1d2833", "#5b9dcc", "#ffe08a", "#f2683c", "#ff2e55"];

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // The arm's colour, as light as the dark theme needs it.
  function legible(hex) {
    if (!dark.matches) return hex;
    let parts = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    while (0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] < 95) {
      parts = parts.map((part) => Math.ceil(part + 0.15 * (255 - part)));
    }
    return `rgb(${parts.join()})`;
  }

  function axis(own) {
    return {
      gridcolor: colour("--line"), linecolor: colour("--line"), tickcolor: colour("--line"), zeroline: false,
      automargin: true, exponentformat: "none", ...own,
    };
  }

  function layout(x, y, more) {
    return {
      font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: colour("--quiet") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 44, r: 14, t: 12, b: 40 }, showlegend: false,
      dragmode: touch.matches ? false : "zoom",
      hoverlabel: { bgcolor: colour("--paper"), bordercolor: colour("--line"), font: { color: colour("--ink"), size: 12.5 } },
      xaxis: axis({ title: { text: "step", standoff: 6, font: { size: 12.5 } }, showgrid: false, ...x }), yaxis: axis(y), ...more,
    };
  }

  function lines(chart) {
    const names = Object.fromEntries(buttons.map((button) => [button.dataset.arm, button.textContent]));
    const data = chart.data.map((trace) => {
      const shade = legible(trace.meta.colour);
      const styled = { ...trace, name: names[trace.meta.arm], visible: !hidden.has(trace.meta.arm) };
      if (trace.line) styled.line = { ...trace.line, color: shade };
      if (trace.marker) styled.marker = { ...trace.marker, color: shade, line: { ...trace.marker.line, color: shade } };
      if (!trace.hoverinfo) styled.hovertemplate = "%{y:.4~g}";
      return styled;
    });
    const own = chart.layout;
    const log = own.yaxis.type === "log";
    const taus = chart.taus || [];
    const shapes = taus.map((tau) => (
      { type: "line", xref: "paper", x0: 0, x1: 1, y0: tau, y1: tau, line: { color: colour("--ink"), width: 1.2, dash: "5px,4px" } }
    ));
    const annotations = taus.map((tau) => ({
      text: `τ = ${tau}`, xref: "paper", x: 0, xanchor: "left", y: log ? Math.log10(tau) : tau, yanchor: "bottom", yshift: -1,
      showarrow: false, font: { color: colour("--ink"), size: 12.5 },
    }));
    const ticks = log ? { dtick: "D2", tickformat: "~g" } : {};
    const few = new Set(chart.data.map((trace) => trace.meta.arm)).size <= 8;
    return {
      data,
      layout: layout(own.xaxis, { ...ticks, ...own.yaxis }, { shapes, annotations, hovermode: few ? "x unified" : "closest" }),
    };
  }

  function heads(chart) {
    const low = Math.log10(chart.floor), high = Math.log10(chart.top), at = Math.log10(chart.tau);
    const seed = seeds && chart.runs[seeds.value] ? seeds.value : Object.keys(chart.runs)[0];
    const z = chart.runs[seed].map((row) => row.map((logit) => logit === null ? null : Math.log10(Math.max(logit, chart.floor))));
    const text = chart.runs[seed].map((row, head) => row.map((logit, bin) => {
      const [first, last] = chart.bins[bin];
      return `${chart.rows[head]}<br>step${first === last ? ` ${first}` : `s ${first} to ${last}`}: ${logit === null ? "not measured" : logit}`;
    }));
    const share = (at - low) / (high - low), scale = dark.matches ? DARK_SCALE : SCALE;
    const decades = [];
    for (let power = Math.ceil(low); power <= high; power += 1) if (Math.abs(power - at) > 0.12 * (high - low)) decades.push(power);
    const middles = [], names = [], shapes = [];
    let row = 0;
    for (const [name, width] of chart.layers) {
      middles.push(row + (width - 1) / 2);
      names.push(name);
      if (row) shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: row - 0.5, y1: row - 0.5, line: { color: colour("--paper"), width: 2 } });
      row += width;
    }
    const every = Math.ceil(names.length / 10);
    return {
      data: [{
        type: "heatmap", z, text, hovertemplate: "%{text}<extra></extra>", hoverongaps: false,
        x: chart.bins.map(([first, last]) => (first + last) / 2), zmin: low, zmax: high,
        colorscale: [[0, scale[0]], [share, scale[1]], [share, scale[2]], [(1 + share) / 2, scale[3]], [1, scale[4]]],
        colorbar: {
          thickness: 10, outlinewidth: 0, ticks: "", xpad: 6, tickfont: { size: 12 },
          tickvals: [...decades, at], ticktext: [...decades.map((power) => `${Number(10 ** power).toPrecision(1) * 1}`), `<b>τ ${chart.tau}</b>`],
        },
      }],
      layout: layout({ range: [0.5, chart.bins[chart.bins.length - 1][1] + 0.5] }, {
        range: [row - 0.5, -0.5], tickvals: middles.filter((_, index) => index % every === 0),
        ticktext: names.filter((_, index) => index % every === 0), showgrid: false, ticks: "",
      }, { shapes, hovermode: "closest" }),
    };
  }

  const home = new Map();

  async function draw(index) {
    const chart = charts[index], place = places[index];
    if (chart.arm) place.parentElement.hidden = hidden.has(chart.arm);
    if (place.parentElement.hidden) return;
    const { data, layout } = chart.kind === "heads" ? heads(chart) : lines(chart);
    const zoomed = home.has(place) && ranges(place);
    await Plotly.react(place, data, layout, { displayModeBar: false, responsive: true, doubleClick: "reset", showTips: false });
    if (zoomed) {
      if (String(zoomed) !== String(home.get(place))) await show(place, zoomed);
    } else {
      home.set(place, ranges(place));
      pinches(place);
    }
  }

  let drawing = Promise.resolve();
  const drawAll = () => { drawing = drawing.then(redraw); };

  async function redraw() {
    for (const button of buttons) button.querySelector("i").style.background = legible(button.dataset.colour);
    for (let index = 0; index < charts.length; index += 1) await draw(index);
    document.documentElement.dataset.charts = "drawn";
  }

  const ranges = (place) => [[...place._fullLayout.xaxis.range], [...place._fullLayout.yaxis.range]];
  const show = (place, [x, y]) => Plotly.relayout(place, { "xaxis.range": x, "yaxis.range": y });

  // Two fingers zoom and move, never beyond the whole; one finger scrolls the page. Two taps are Plotly's double click.
  function pinches(place) {
    let start = null;
    const hold = (event) => {
      const { left, top } = place.getBoundingClientRect(), size = place._fullLayout._size;
      const [a, b] = [...event.touches].map((finger) => [
        (finger.clientX - left - size.l) / size.w, 1 - (finger.clientY - top - size.t) / size.h,
      ]);
      const away = Math.hypot((a[0] - b[0]) * size.w, (a[1] - b[1]) * size.h);
      return { centre: [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2], away: Math.max(away, 10) };
    };
    place.addEventListener("touchstart", (event) => {
      if (event.touches.length === 2) {
        event.preventDefault();
        event.stopPropagation();
        start = { ...hold(event), from: ranges(place) };
      }
    }, { capture: true, passive: false });
    place.addEventListener("touchmove", (event) => {
      if (!start || event.touches.length !== 2) return;
      event.preventDefault();
      event.stopPropagation();
      const now = hold(event), whole = home.get(place);
      show(place, start.from.map(([low, high], side) => {
        const [first, last] = whole[side];
        const span = Math.min(1, (start.away / now.away) * ((high - low) / (last - first))) * (last - first);
        const held = low + start.centre[side] * (high - low);
        const begin = Math.min(1 - span / (last - first), Math.max(0, (held - now.centre[side] * span - first) / (last - first)));
        return [first + begin * (last - first), first + begin * (last - first) + span];
      }));
    }, { capture: true, passive: false });
    place.addEventListener("touchend", (event) => {
      if (event.touches.length < 2) start = null;
    }, true);
  }

  for (const button of buttons) {
    const arm = button.dataset.arm;
    const press = () => {
      for (const other of buttons) other.setAttribute("aria-pressed", String(!hidden.has(other.dataset.arm)));
      drawAll();
    };
    button.addEventListener("click", () => {
      if (!hidden.delete(arm)) hidden.add(arm);
      press();
    });
    button.addEventListener("dblclick", () => {
      const alone = buttons.every((other) => hidden.has(other.dataset.arm) === (other !== button));
      hidden.clear();
      if (!alone) for (const other of buttons) if (other !== button) hidden.add(other.dataset.arm);
      press();
    });
  }
  if (seeds) seeds.addEventListener("change", drawAll);
  dark.addEventListener("change", drawAll);
  drawAll();
})();
