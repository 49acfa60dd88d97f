"use strict";
// The charts of viewer.js: the tokens around the cursor, and the whole response. `view` is what viewer.js shows.

function chartsOf(view) {
  const { root, part, texts, state, values, advantages, measured, deviation, drawn, colours, dashes, opens, length, show } = view;
  const MARGIN = 52;
  let window_ = [0, 0], edges = []; // tokens of the close-up, and where each begins

  function draw() {
    if (state.numbers.length) {
      drawChart(part("near"), near());
      drawChart(part("whole"), whole());
    }
  }

  function prepared(canvas) {
    const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.font = "13px ui-monospace, Menlo, Consolas, monospace";
    return { context, width, height };
  }

  // The tokens around the cursor, each as wide as its text.
  function near() {
    const at = prepared(part("near"));
    const label = (t) => {
      const text = texts[state.pieces[t]];
      return text === "" ? "◌" : text.replaceAll("\n", "↵").replaceAll(" ", "·").slice(0, 24);
    };
    const size = (t) => Math.max(16, at.context.measureText(label(t)).width + 4);
    const room = at.width - MARGIN - 4;
    let first = state.cursor, end = state.cursor + 1, used = size(state.cursor);
    for (let grows = true; grows; ) {
      grows = false;
      for (const t of [end, first - 1])
        if (t >= 0 && t < length() && used + size(t) <= room) {
          used += size(t);
          grows = true;
          if (t === end) end++;
          else first--;
        }
    }
    window_ = [first, end];
    edges = [MARGIN];
    for (let t = first; t < end; t++) edges.push(edges.at(-1) + size(t));
    const left = (t) => edges[t - first];
    return { ...at, first, end, left, right: (t) => edges[t - first + 1], label, bottom: 24 };
  }

  function whole() {
    const at = prepared(part("whole")), size = (at.width - MARGIN - 4) / length();
    const left = (t) => MARGIN + t * size;
    return { ...at, first: 0, end: length(), left, right: (t) => left(t + 1), label: null, bottom: 16 };
  }

  const css = (name) => getComputedStyle(root).getPropertyValue(`--${name}`);

  function drawChart(canvas, chart) {
    const { context, width, height, first, end, left, right, label, bottom } = chart;
    const inner = height - bottom, half = Math.round(inner * 0.45);
    const middle = (t) => (left(t) + right(t)) / 2;
    if (label === null) { // The part that the close-up shows.
      context.fillStyle = css("seg0");
      context.fillRect(left(window_[0]), 0, right(window_[1] - 1) - left(window_[0]), inner);
    }
    context.strokeStyle = css("muted");
    context.lineWidth = 1;
    context.setLineDash([1, 2]);
    const highest = label ? 0 : inner - 8;
    for (let t = first; t < end; t++) if (opens(t)) stroke(context, left(t), highest, left(t), inner);
    context.setLineDash([]);
    const shown = (group) => group.filter((c) => drawn.has(c));
    const points = measured === undefined ? [] : [measured];
    if (values.length || points.length)
      band(chart, middle, "value", shown(values), points, values, 6, half - 6, [0, 1]);
    band(chart, middle, "advantage", shown(advantages), [], advantages, values.length || points.length ? half + 6 : 6, inner - 6, [0, 0]);
    const at = state.hover ?? state.cursor;
    context.fillStyle = css("text");
    if (label) {
      for (let t = first; t < end; t++) context.fillText(label(t), left(t) + 2, height - 7);
      if (at >= first && at < end) {
        context.strokeStyle = css("text");
        context.lineWidth = 1.5;
        context.strokeRect(left(at), 1, right(at) - left(at), height - 2);
      }
    } else {
      context.strokeStyle = css("text");
      context.lineWidth = 1.5;
      stroke(context, middle(at), 0, middle(at), inner);
      context.fillStyle = css("muted");
      context.textAlign = "right";
      context.fillText(`${length()} tokens`, width - 4, height - 3);
      context.textAlign = "left";
      context.fillText("0", MARGIN, height - 3);
    }
  }

  function stroke(context, x1, y1, x2, y2) {
    context.beginPath();
    context.moveTo(x1, y1);
    context.lineTo(x2, y2);
    context.stroke();
  }

  // Lines of one kind between the heights `top` and `low`. Their scale is that of the whole response, so that it stays.
  function band({ context, width, first, end, label }, middle, name, lines, points, group, top, low, range) {
    let [least, most] = range;
    for (const c of [...lines, ...points])
      for (const number of state.numbers[c]) {
        if (number < least) least = number;
        if (number > most) most = number;
      }
    if (least === most) [least, most] = [-1, 1];
    const y = (number) => low - ((number - least) / (most - least)) * (low - top);
    context.fillStyle = css("muted");
    for (const number of new Set([least, 0, most])) {
      context.strokeStyle = css(number === 0 ? "muted" : "grid");
      context.lineWidth = 1;
      stroke(context, MARGIN, y(number), width, y(number));
      const isClear = number !== 0 || [least, most].every((edge) => edge === 0 || Math.abs(y(edge) - y(0)) > 20);
      if (isClear) context.fillText(show(number).replace("-", "−"), 2, y(number) + (number === least ? 0 : number === most ? 10 : 4));
    }
    for (const c of lines) {
      const index = group.indexOf(c);
      context.strokeStyle = context.fillStyle = css(colours[index % 4]);
      context.setLineDash(dashes[Math.floor(index / 4) % 3]);
      context.lineWidth = 1.8;
      context.beginPath();
      let isOpen = false;
      for (let t = first; t < end; t++) {
        const number = state.numbers[c][t];
        if (!Number.isFinite(number)) isOpen = false;
        else if (isOpen) context.lineTo(middle(t), y(number));
        else {
          context.moveTo(middle(t), y(number));
          isOpen = true;
        }
      }
      context.stroke();
      context.setLineDash([]);
    }
    if (label) { // The overview has the same bands, and no room.
      const size = context.measureText(name).width + 8;
      context.fillStyle = css("card");
      context.fillRect(width - size, top - 5, size, 18);
      context.fillStyle = css("muted");
      context.fillText(name, width - size + 4, top + 9);
    }
    context.strokeStyle = context.fillStyle = css("text");
    context.lineWidth = 1;
    for (const c of points)
      for (let t = first; t < end; t++) {
        const number = state.numbers[c][t], error = state.numbers[deviation][t];
        if (!Number.isFinite(number)) continue;
        context.fillRect(middle(t) - 2.5, y(number) - 2.5, 5, 5);
        if (Number.isFinite(error)) stroke(context, middle(t), y(number - error), middle(t), y(number + error));
      }
  }

  function tokenAt(canvas, event) {
    const x = event.offsetX;
    if (canvas === part("whole")) return Math.floor(((x - MARGIN) / (canvas.clientWidth - MARGIN - 4)) * length());
    const found = edges.findIndex((edge) => edge > x);
    return found < 0 ? window_[1] - 1 : window_[0] + Math.max(0, found - 1);
  }

  return { draw, tokenAt };
}
