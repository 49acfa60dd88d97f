"use strict";
// Shows the responses in #viewer-data token by token. `?` on the page lists its keys.

(() => {
  const data = JSON.parse(document.getElementById("viewer-data").textContent);
  const root = document.getElementById("viewer");
  const part = (name) => root.querySelector(`[data-part="${name}"]`);
  const { columns, texts, responses } = data;
  const special = new Set(data.special);
  const ofKind = (...kinds) => columns.flatMap((column, c) => (kinds.includes(column.kind) ? [c] : []));
  const [logprob, entropy, measured, deviation, sampled] =
    ["logprob", "entropy", "measured", "deviation", "sampled"].map((kind) => ofKind(kind)[0]);
  const values = ofKind("value"), advantages = ofKind("advantage"), segmentations = ofKind("segments");
  const COLOURS = ["c1", "c2", "c3", "c4"], STYLES = ["solid", "dashed", "dotted"], DASHES = [[], [7, 3], [2, 3]];
  const drawn = new Set([...values.slice(0, 1), ...advantages.slice(0, 3)]);
  // What is shown: a response of the list, its numbers by column, and places in it.
  const state = { row: -1, numbers: [], ids: [], pieces: [], cursor: 0, hover: null, segments: segmentations[0], shade: logprob };
  let listed = [], searched = null, asked = 0;

  // -- Data ------------------------------------------------------------------------------------------------------------

  async function unpack(text) {
    const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const planes = new Uint8Array(await new Response(stream).arrayBuffer());
    const bytes = new Uint8Array(planes.length), count = planes.length / 4;
    for (let plane = 0; plane < 4; plane++)
      for (let i = 0; i < count; i++) bytes[4 * i + plane] = planes[plane * count + i];
    return bytes.buffer;
  }

  const piecesOf = async (response) => new Uint32Array(await unpack(response.tokens));

  function show(number) {
    if (!Number.isFinite(number)) return "–";
    const size = Math.abs(number);
    return size > 0 && size < 0.001 ? number.toExponential(1) : size < 100 ? number.toPrecision(3) : number.toFixed(0);
  }

  const signed = (number) => (number > 0 ? "+" : "") + show(number).replace("-", "−");
  const probability = (t) => Math.exp(state.numbers[logprob][t]);
  const opens = (t) => state.segments !== undefined && state.numbers[state.segments][t] >= 0.5;
  const length = () => state.pieces.length;

  // -- The list of responses ---------------------------------------------------------------------------------------------

  const listOrder = {
    recorded: (a, b) => a.index - b.index,
    highest: (a, b) => b.reward - a.reward || a.index - b.index,
    lowest: (a, b) => a.reward - b.reward || a.index - b.index,
  };

  async function fillList() {
    const kind = part("kind").value, query = part("search").value.toLowerCase();
    const mine = ++asked;
    if (query && !searched)
      searched = await Promise.all(responses.map(async (response) => {
        const all = await piecesOf(response);
        return Array.from(all.subarray(0, all.length / 2), (piece) => texts[piece]).join("").toLowerCase();
      }));
    if (mine !== asked) return; // A later key was pressed while the texts were unpacked.
    listed = responses.map((response, row) => ({ ...response, row }))
      .filter((each) => kind === "all" || each.right === (kind === "right"))
      .filter((each) => !query || searched[each.row].includes(query) || each.id.toLowerCase().includes(query))
      .sort(listOrder[part("order").value]);
    part("list").replaceChildren(...listed.map((each) => {
      const item = document.createElement("li"), button = document.createElement("button");
      button.type = "button";
      button.dataset.row = each.row;
      const mark = document.createElement("b");
      mark.className = each.right ? "right" : "wrong";
      mark.textContent = each.right ? "✓ right" : "✗ wrong";
      const place = Object.assign(document.createElement("span"), { textContent: each.id });
      button.append(mark, ` ${show(each.reward)}, ${each.length.toLocaleString("en")} tokens`, place);
      item.append(button);
      return item;
    }));
    part("count").textContent = `${listed.length} of ${responses.length} responses` +
      (responses.length < data.total ? `; the step has ${data.total}` : "");
    markListed();
    if (state.row >= 0) markHits();
  }

  function markListed() {
    for (const button of part("list").querySelectorAll("button")) {
      const isShown = Number(button.dataset.row) === state.row;
      button.setAttribute("aria-current", isShown);
      const list = part("list"), place = button.parentElement;
      if (isShown && (place.offsetTop < list.scrollTop || place.offsetTop + place.offsetHeight > list.scrollTop + list.clientHeight))
        list.scrollTop = place.offsetTop - list.clientHeight / 2;
    }
  }

  function step(by) {
    if (!listed.length) return;
    const at = listed.findIndex((each) => each.row === state.row);
    const next = at < 0 ? 0 : (at + by + listed.length) % listed.length;
    select(listed[next].row, 0);
  }

  // -- One response --------------------------------------------------------------------------------------------------------

  async function select(row, cursor) {
    state.row = row;
    const response = responses[row];
    const [ids, buffer] = await Promise.all([piecesOf(response), unpack(response.numbers)]);
    if (state.row !== row) return; // Another response was chosen while this one was unpacked.
    const count = response.length;
    state.pieces = ids.subarray(0, count);
    state.ids = ids.subarray(count);
    state.numbers = columns.map((_, c) => new Float32Array(buffer, 4 * c * count, count));
    state.hover = null;
    part("title").textContent = `${response.right ? "✓ Right" : "✗ Wrong"}, reward ${show(response.reward)}: ${response.id}`;
    const prompt = data.prompts[response.prompt];
    const ended = response.finish_reason === "stop" ? "by itself" : "at the length limit";
    const facts = { Prompt: prompt.text, Answer: prompt.answer, Verifier: response.why, Ended: ended, Index: response.index };
    part("facts").replaceChildren(...Object.entries(facts).flatMap(([name, text]) => [
      Object.assign(document.createElement("dt"), { textContent: name }),
      Object.assign(document.createElement("dd"), { textContent: text ?? "–" }),
    ]));
    const box = part("tokens"), fragment = document.createDocumentFragment();
    for (let t = 0; t < count; t++) {
      const token = document.createElement("i"), text = texts[state.pieces[t]];
      token.textContent = text === "" ? "◌" : text.replaceAll("\n", "↵\n");
      if (text === "") token.className = "part";
      if (special.has(state.pieces[t])) token.className = "special";
      if (sampled !== undefined && !state.numbers[sampled][t]) token.className = "given";
      fragment.append(token);
    }
    box.replaceChildren(fragment);
    shade();
    markSegments();
    markListed();
    markHits();
    moveTo(Math.min(cursor, count - 1));
  }

  function shade() {
    const c = state.shade, numbers = state.numbers[c], kind = columns[c].kind;
    const isSigned = kind === "advantage", tokens = part("tokens").children;
    const finite = numbers.filter(Number.isFinite).map(Math.abs);
    const most = finite.reduce((a, b) => Math.max(a, b), 0) || 1;
    const colour = isSigned ? null : "c2";
    for (let t = 0; t < numbers.length; t++) {
      const number = numbers[t];
      const part = !Number.isFinite(number) ? 0 : kind === "logprob" ? 1 - Math.exp(number) : Math.abs(number) / most;
      const percent = Math.round(40 * Math.min(1, part));
      const name = colour ?? (number >= 0 ? "c1" : "c2");
      const style = tokens[t].style;
      style.backgroundColor = percent ? `color-mix(in srgb, var(--${name}) ${percent}%, transparent)` : "";
      style.textDecoration = isSigned && percent > 2 ? (number >= 0 ? "underline" : "underline dotted") : "";
    }
    part("legend").textContent = {
      logprob: "The stronger the shade of a token, the less probable it was.",
      advantage: `Underlined: positive. Dotted: negative. The strongest shade stands for ${show(most)}.`,
    }[kind] ?? `The strongest shade stands for ${show(most)}.`;
  }

  function markSegments() {
    const tokens = part("tokens").children;
    for (let t = 0; t < length(); t++) tokens[t].classList.toggle("opens", opens(t));
  }

  function moveTo(t) {
    const tokens = part("tokens").children;
    tokens[state.cursor]?.removeAttribute("aria-current");
    state.cursor = Math.max(0, Math.min(length() - 1, t));
    const token = tokens[state.cursor], box = part("tokens");
    token.setAttribute("aria-current", "true");
    const above = token.offsetTop - 8, below = token.offsetTop + token.offsetHeight + 8;
    if (above < box.scrollTop) box.scrollTop = above;
    if (below > box.scrollTop + box.clientHeight) box.scrollTop = below - box.clientHeight;
    state.hover = null;
    refresh();
    remember();
  }

  function toBoundary(by) {
    let t = state.cursor + by;
    while (t > 0 && t < length() - 1 && !opens(t)) t += by;
    moveTo(t);
  }

  let timer;
  function remember() {
    clearTimeout(timer); // Browsers limit how often a page may change its address.
    const place = `#${responses[state.row].index}/${state.cursor}`;
    timer = setTimeout(() => history.replaceState(null, "", place), 500);
  }

  // -- Search ----------------------------------------------------------------------------------------------------------------

  let hits = [], searching;

  function markHits() {
    const query = part("search").value.toLowerCase(), tokens = part("tokens").children;
    const starts = [], text = Array.from(state.pieces, (piece) => texts[piece].toLowerCase());
    for (let t = 0, at = 0; t < text.length; at += text[t++].length) starts.push(at);
    hits = [];
    for (const token of part("tokens").querySelectorAll(".hit")) token.classList.remove("hit");
    const whole = text.join("");
    for (let at = query ? whole.indexOf(query) : -1, t = 0; at >= 0; at = whole.indexOf(query, at + query.length)) {
      while (t + 1 < starts.length && starts[t + 1] <= at) t++;
      hits.push(t);
      for (let u = t; u < starts.length && starts[u] < at + query.length; u++) tokens[u].classList.add("hit");
    }
    part("hits").textContent = query ? `${hits.length} in this response` : "";
  }

  async function nextHit(by) {
    await searching;
    const beyond = by > 0 ? hits.find((t) => t > state.cursor) : hits.findLast((t) => t < state.cursor);
    if (beyond !== undefined) return moveTo(beyond);
    if (!listed.length || !part("search").value) return;
    const at = listed.findIndex((each) => each.row === state.row);
    await select(listed[(at + by + listed.length) % listed.length].row, 0);
    if (hits.length) moveTo(by > 0 ? hits[0] : hits.at(-1));
  }

  // -- Numbers of the token at the cursor ----------------------------------------------------------------------------------------

  function sample(index) {
    const line = document.createElement("span");
    line.className = "line";
    line.style.borderTop = `3px ${STYLES[Math.floor(index / 4) % 3]} var(--${COLOURS[index % 4]})`;
    return line;
  }

  function buildPanel() {
    const row = (label, c, index) => {
      const line = document.createElement("tr"), name = document.createElement("th"), number = document.createElement("td");
      name.scope = "row";
      if (index === undefined) name.textContent = label;
      else {
        const choice = document.createElement("label"), box = document.createElement("input");
        Object.assign(box, { type: "checkbox", checked: drawn.has(c) });
        box.addEventListener("change", () => {
          if (box.checked) drawn.add(c);
          else drawn.delete(c);
          draw();
        });
        choice.append(box, sample(index), label);
        name.append(choice);
      }
      number.dataset.number = c;
      line.append(name, number);
      return line;
    };
    const title = (text) => {
      const line = document.createElement("tr");
      line.append(Object.assign(document.createElement("th"), { textContent: text, colSpan: 2, scope: "rowgroup", className: "group" }));
      return line;
    };
    const rows = [row("probability", "probability"), row("log probability", logprob)];
    if (entropy !== undefined) rows.push(row("entropy, nats", entropy));
    rows.push(row("segment", "segment"));
    if (values.length || measured !== undefined) rows.push(title("Value before the token"));
    rows.push(...values.map((c, index) => row(columns[c].label, c, index)));
    if (measured !== undefined) rows.push(row(`${columns[measured].label}, ± standard error`, measured));
    rows.push(title("Advantage, before whitening"), ...advantages.map((c, index) => row(columns[c].label, c, index)));
    part("numbers").replaceChildren(...rows);
  }

  function refresh() {
    const t = state.hover ?? state.cursor;
    const text = texts[state.pieces[t]];
    part("token").textContent = text === "" ? "part of a character" : JSON.stringify(text);
    const given = sampled !== undefined && !state.numbers[sampled][t] ? ", not sampled by the policy" : "";
    part("place").textContent = `token ${t} of ${length()}, id ${state.ids[t]}${given}`;
    let segment = 0, count = 0;
    for (let u = 0; u < length(); u++)
      if (opens(u)) {
        count++;
        if (u <= t) segment++;
      }
    for (const cell of part("numbers").querySelectorAll("[data-number]")) {
      const c = cell.dataset.number;
      if (c === "probability") cell.textContent = show(probability(t));
      else if (c === "segment") cell.textContent = count ? `${segment} of ${count}${opens(t) ? ", opens" : ""}` : "–";
      else {
        const number = state.numbers[c][t], isSigned = columns[c].kind === "advantage";
        const error = Number(c) === measured && Number.isFinite(number) ? ` ± ${show(state.numbers[deviation][t])}` : "";
        cell.textContent = (isSigned ? signed(number) : show(number).replace("-", "−")) + error;
      }
    }
    draw();
  }

  const { draw, tokenAt } = chartsOf({
    root, part, texts, state, values, advantages, measured, deviation, drawn, colours: COLOURS, dashes: DASHES, opens, length, show,
  });

  // -- Events ------------------------------------------------------------------------------------------------------------------------

  function hover(t) {
    state.hover = t === null ? null : Math.max(0, Math.min(length() - 1, t));
    refresh();
  }

  for (const canvas of [part("near"), part("whole")]) {
    canvas.addEventListener("mousemove", (event) => hover(tokenAt(canvas, event)));
    canvas.addEventListener("mouseleave", () => hover(null));
    canvas.addEventListener("click", (event) => moveTo(tokenAt(canvas, event)));
  }
  const indexOf = (target) => (target.tagName === "I" ? Array.prototype.indexOf.call(part("tokens").children, target) : null);
  part("tokens").addEventListener("mouseover", (event) => hover(indexOf(event.target)));
  part("tokens").addEventListener("mouseleave", () => hover(null));
  part("tokens").addEventListener("click", (event) => {
    const t = indexOf(event.target);
    if (t !== null) moveTo(t);
  });
  part("list").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) select(Number(button.dataset.row), 0);
  });
  for (const name of ["kind", "order"]) part(name).addEventListener("change", fillList);
  part("search").addEventListener("input", () => { searching = fillList(); });
  part("search").addEventListener("keydown", (event) => {
    if (event.key === "Enter") nextHit(event.shiftKey ? -1 : 1);
    if (event.key === "Escape") part("tokens").focus();
  });

  function options(select, indices, labels, chosen, act) {
    select.replaceChildren(...indices.map((c, i) => new Option(labels[i], c, false, c === chosen)));
    select.addEventListener("change", () => act(Number(select.value)));
  }

  const shades = [logprob, entropy, ...values, ...advantages].filter((c) => c !== undefined);
  options(part("segments"), segmentations, segmentations.map((c) => columns[c].label), state.segments, (c) => {
    state.segments = c;
    markSegments();
    refresh();
  });
  options(part("shade"), shades, shades.map((c) => (c === logprob ? "probability" : columns[c].label)), logprob, (c) => {
    state.shade = c;
    shade();
  });

  function cycle(select) {
    select.selectedIndex = (select.selectedIndex + 1) % select.options.length;
    select.dispatchEvent(new Event("change"));
  }

  const keys = {
    ArrowLeft: (event) => (event.shiftKey ? toBoundary(-1) : moveTo(state.cursor - 1)),
    ArrowRight: (event) => (event.shiftKey ? toBoundary(1) : moveTo(state.cursor + 1)),
    Home: () => moveTo(0),
    End: () => moveTo(length() - 1),
    n: () => step(1),
    p: () => step(-1),
    f: () => cycle(part("kind")),
    s: () => cycle(part("segments")),
    c: () => cycle(part("shade")),
    "/": () => part("search").focus(),
    "?": () => part("help").showModal(),
  };
  part("keys").addEventListener("click", keys["?"]);
  document.addEventListener("keydown", (event) => {
    const isField = event.target.matches("input:not([type=checkbox]), select, dialog *");
    if (isField || event.ctrlKey || event.metaKey || event.altKey || !keys[event.key] || !length()) return;
    event.preventDefault();
    keys[event.key](event);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  new ResizeObserver(draw).observe(part("whole"));

  buildPanel();
  const [, index, token] = location.hash.match(/^#(\d+)\/(\d+)$/) ?? [];
  const wanted = responses.findIndex((each) => each.index === Number(index ?? data.first));
  fillList().then(() => select(Math.max(0, wanted), Number(token ?? 0)));
})();
