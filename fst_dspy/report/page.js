"use strict";
// The rollouts browser. Texts come from a language model: they only ever become text nodes.
(() => {
  const PER_PAGE = 25;
  const FORMAT = ["parse", "empty", "truncated"];
  const $ = (id) => document.getElementById(id);
  const form = $("filters"), list = $("list"), pages = $("pages"), page = $("page");
  const field = form.elements;
  let runs = [], run = null, shown = [], at = 0;

  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };
  const textOf = (n) => run.texts[n].map((line) => run.lines[line]).join("\n");
  const fill = (select, options) => {
    const kept = select.value;
    select.replaceChildren(...options.map(([value, words]) => {
      const option = make("option", words);
      option.value = value;
      return option;
    }));
    if (options.some(([value]) => String(value) === kept)) select.value = kept;
  };
  const tally = (column) => {
    const counts = new Map();
    for (const value of column) counts.set(value, (counts.get(value) || 0) + 1);
    return counts;
  };

  function choose(number) {
    run = runs[number] || runs[0];
    const { kind, candidate, example, stock } = run.columns;
    const kinds = tally(kind);
    const format = kind.filter((k) => FORMAT.includes(run.kinds[k])).length;
    fill(field.kind, [
      ["", "all"],
      ["scored", `no failure (${kinds.get(-1) || 0})`],
      ["failed", `any failure (${kind.length - (kinds.get(-1) || 0)})`],
      ["format", `wrong format (${format})`],
      ["stock", `stock answer (${stock.filter(Boolean).length})`],
      ...run.kinds.map((name, k) => [`kind ${name}`, `${name} (${kinds.get(k) || 0})`]),
    ]);
    const named = (names, column) => {
      const counts = tally(column);
      return [["", "all"], ...names.map((name, n) => [n, `${name} (${counts.get(n) || 0})`])];
    };
    fill(field.candidate, named(run.candidates, candidate));
    fill(field.example, named(run.examples, example));
  }

  // A search looks at each different line once, then at the texts that have it.
  function textsWith(words) {
    const wanted = words.toLowerCase();
    const hit = run.lines.map((line) => line.toLowerCase().includes(wanted));
    return run.texts.map((lines) => lines.some((line) => hit[line]));
  }

  function matches() {
    const c = run.columns, kind = field.kind.value, words = field.text.value.trim();
    const candidate = field.candidate.value, example = field.example.value;
    const step = field.step.value, found = words ? textsWith(words) : null;
    const has = (n) => n >= 0 && found[n];
    const test = (n) => {
      const name = c.kind[n] < 0 ? null : run.kinds[c.kind[n]];
      if (kind === "scored" && name !== null) return false;
      if (kind === "failed" && name === null) return false;
      if (kind === "format" && !FORMAT.includes(name)) return false;
      if (kind === "stock" && !c.stock[n]) return false;
      if (kind.startsWith("kind ") && name !== kind.slice(5)) return false;
      if (candidate !== "" && c.candidate[n] !== +candidate) return false;
      if (example !== "" && c.example[n] !== +example) return false;
      if (step !== "" && c.step[n] !== +step) return false;
      return !found || has(c.feedback[n]) || has(c.message[n])
        || c.calls[n].some((call) => has(call[1]) || has(call[2]))
        || c.traces[n].some((trace) => has(trace[1]) || has(trace[2]));
    };
    return c.step.map((_, n) => n).filter(test);
  }

  // What a rollout is ordered by, the smallest first; a problem by the mean over its rollouts.
  function ranks() {
    const c = run.columns;
    const length = (n) => c.calls[n].reduce((sum, call) => sum + call[3], 0);
    return {
      low: (n) => c.reward[n],
      high: (n) => -c.reward[n],
      logged: (n) => n,
      strong: (n) => -Math.abs(c.advantage[n]),
      long: (n) => -length(n),
    }[field.order.value];
  }
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

  function problems(found, rank) {
    const groups = new Map();
    for (const n of found) {
      const example = run.columns.example[n];
      if (!groups.has(example)) groups.set(example, []);
      groups.get(example).push(n);
    }
    const ranked = [...groups].map(([example, own]) => ({ example, own, rank: mean(own.map(rank)) }));
    return ranked.sort((a, b) => a.rank - b.rank || b.own.length - a.own.length);
  }

  function part(title, text, folded) {
    const pre = make("pre", text);
    if (!folded) {
      const box = make("div");
      box.append(make("p", title, "name"), pre);
      return box;
    }
    const box = make("details");
    box.append(make("summary", title), pre);
    return box;
  }

  function calls(n, from, to, folded) {
    return run.columns.calls[n].slice(from, to).flatMap(([name, prompt, completion, tokens, cut]) => {
      const who = run.predictors[name], note = `${tokens} tokens${cut ? ", cut off" : ""}`;
      const said = part(`${who}: completion (${note})`, textOf(completion), folded);
      return prompt < 0 ? [said] : [part(`${who}: prompt`, textOf(prompt), true), said];
    });
  }

  // What an agent saw, did and was shown, turn by turn; what it was shown is mostly what it saw next.
  function trajectory(n) {
    const turns = run.columns.turns[n], list = make("ol", undefined, "turns");
    let asked = 0;
    turns.forEach(([observation, action, result, reward, status, upTo], k) => {
      const item = make("li"), state = textOf(status);
      const earned = reward ? `, reward ${reward > 0 ? "+" : ""}${reward}` : "";
      const head = make("p", `Turn ${k + 1}${earned}`, "turn");
      if (state !== "ok") head.append(" ", make("span", state, "fail"));
      item.append(head, part("observation", textOf(observation)), part("action", textOf(action)));
      if (result !== turns[k + 1]?.[0]) item.append(part("result", textOf(result)));
      item.append(...calls(n, asked, upTo, true));
      asked = upTo;
      list.append(item);
    });
    const box = make("div");
    box.append(list, ...calls(n, asked, Infinity, true));
    return box;
  }

  function body(n) {
    const c = run.columns, box = make("div", undefined, "body");
    const kind = c.kind[n] < 0 ? null : run.kinds[c.kind[n]];
    box.append(make("p", `Rollout ${n + 1}, cycle ${c.cycle[n]}, step ${c.step[n]}, example `
      + `${run.examples[c.example[n]]}, candidate ${run.candidates[c.candidate[n]]}`));
    if (kind !== null) box.append(make("p", `${kind}: ${textOf(c.message[n])}`, "fail"));
    if (c.turns[n].length) box.append(trajectory(n));
    else {
      c.traces[n].forEach(([name, inputs, , own]) => {
        box.append(part(`${run.predictors[name]}: inputs`, textOf(inputs)));
        if (own >= 0) box.append(part(`${run.predictors[name]}: feedback`, textOf(own)));
      });
      box.append(...calls(n, 0, c.calls[n].length));
      c.traces[n].forEach(([name, , outputs]) => {
        const words = outputs < 0 ? "nothing was parsed" : textOf(outputs);
        box.append(part(`${run.predictors[name]}: parsed`, words, outputs >= 0));
      });
    }
    box.append(part("feedback", textOf(c.feedback[n])));
    const group = make("button", "Show the rollouts of this group");
    group.type = "button";
    group.addEventListener("click", () => {
      form.reset();
      field.run.value = runs.indexOf(run);
      field.step.value = c.step[n];
      field.example.value = c.example[n];
      update();
      form.scrollIntoView();
      field.example.focus();
    });
    box.append(group);
    return box;
  }

  // What was answered, with the reasoning last; where nothing was parsed, what was written.
  function peek(n) {
    const trace = run.columns.traces[n].at(-1), call = run.columns.calls[n].at(-1);
    let text = call ? textOf(call[2]) : "no model call";
    if (trace && trace[2] >= 0) {
      const lines = textOf(trace[2]).split("\n");
      const thought = lines.findIndex((line) => line.startsWith("reasoning: "));
      if (thought >= 0) lines.push(lines.splice(thought, 1)[0]);
      text = lines.join(" · ");
    }
    return text.replace(/\s+/g, " ").slice(0, 160) || "(empty)";
  }

  function row(n) {
    const c = run.columns, item = make("li"), details = make("details");
    const summary = make("summary");
    const kind = c.kind[n] < 0 ? "" : run.kinds[c.kind[n]];
    const advantage = c.advantage[n];
    summary.append(
      make("span", `step ${c.step[n]}`),
      make("span", `r ${c.reward[n]}`, "reward"),
      make("span", `A ${advantage > 0 ? "+" : ""}${advantage.toFixed(2)}`),
      make("span", kind || run.candidates[c.candidate[n]].slice(0, 8), kind ? "fail" : ""),
      make("span", peek(n), "peek"),
    );
    details.append(summary);
    details.addEventListener("toggle", () => {
      if (details.open && details.childElementCount === 1) details.append(body(n));
    });
    if (shown.length === 1 && field.show.value === "rollout") details.open = true;
    item.append(details);
    return item;
  }

  function problem({ example, own }) {
    const c = run.columns, item = make("li"), details = make("details"), summary = make("summary");
    const rewards = own.map((n) => c.reward[n]);
    const first = Math.min(...own.map((n) => c.cycle[n])), last = Math.max(...own.map((n) => c.cycle[n]));
    const of = (cycle) => mean(own.filter((n) => c.cycle[n] === cycle).map((n) => c.reward[n]));
    const failed = own.filter((n) => c.kind[n] >= 0).length;
    const inputs = c.traces[own[0]][0], seen = c.turns[own[0]][0];
    const text = seen ? textOf(seen[0]) : inputs ? textOf(inputs[1]) : "";
    summary.append(
      make("span", `r ${mean(rewards).toFixed(2)}`, "reward"),
      make("span", first < last ? `${of(first).toFixed(2)} → ${of(last).toFixed(2)}` : ""),
      make("span", `${own.length} rollout${own.length === 1 ? "" : "s"}`),
      make("span", failed ? `${failed} failed` : "", "fail"),
      make("span", `${text.replace(/\s+/g, " ").slice(0, 160) || run.examples[example]}`, "peek"),
    );
    details.append(summary);
    const open = () => {
      if (!details.open || details.childElementCount > 1) return;
      const rank = ranks(), sorted = [...own].sort((a, b) => rank(a) - rank(b) || a - b);
      const inner = make("ol", undefined, "rows"), more = make("button");
      more.type = "button";
      const add = () => {
        const from = inner.childElementCount;
        inner.append(...sorted.slice(from, from + PER_PAGE).map(row));
        const left = sorted.length - inner.childElementCount;
        more.textContent = `${Math.min(left, PER_PAGE)} more of ${left}`;
        more.hidden = left === 0;
        if (from) inner.children[from].querySelector("summary").focus();
      };
      more.addEventListener("click", add);
      details.append(make("p", `Example ${run.examples[example]}`, "about"), inner, more);
      add();
    };
    details.addEventListener("toggle", open);
    if (shown.length === 1) details.open = true;
    item.append(details);
    return item;
  }

  function draw() {
    const count = Math.max(1, Math.ceil(shown.length / PER_PAGE));
    at = Math.min(Math.max(0, at), count - 1);
    const draws = field.show.value === "problem" ? problem : row;
    list.replaceChildren(...shown.slice(at * PER_PAGE, (at + 1) * PER_PAGE).map(draws));
    pages.hidden = count === 1;
    page.value = at + 1;
    page.max = count;
    $("last").textContent = count.toLocaleString("en");
    for (const button of pages.querySelectorAll("button")) {
      const back = button.dataset.go === "first" || button.dataset.go === "back";
      button.disabled = back ? at === 0 : at === count - 1;
    }
  }

  // The choice is kept in the address, so that a page that loads itself again does not lose it.
  function update() {
    choose(+field.run.value);
    const found = matches(), rank = ranks(), grouped = field.show.value === "problem";
    shown = grouped ? problems(found, rank) : found.sort((a, b) => rank(a) - rank(b) || a - b);
    at = 0;
    const total = run.columns.step.length.toLocaleString("en");
    const words = shown.length === 1 ? "problem" : "problems";
    const of = grouped ? `, of ${shown.length.toLocaleString("en")} ${words}` : "";
    $("count").textContent = `${found.length.toLocaleString("en")} of ${total} rollouts${of}`;
    draw();
    const usual = (name) => field[name].options?.[0]?.value ?? "";
    const chosen = new URLSearchParams(
      [...new FormData(form)].filter(([name, value]) => value !== usual(name)));
    if (runs.length === 1) chosen.delete("run");
    if (String(chosen)) history.replaceState(null, "", `#rollouts:${chosen}`);
    else if (location.hash.startsWith("#rollouts:")) history.replaceState(null, "", "#rollouts");
  }

  function start() {
    runs = JSON.parse($("data").textContent);
    if (!runs.some((one) => one.columns.step.length)) {
      $("count").textContent = "No rollout is logged.";
      return;
    }
    fill(field.run, runs.map((one, n) => [n, one.label]));
    form.querySelector("[data-run]").hidden = runs.length === 1;
    choose(0);
    const kept = location.hash.startsWith("#rollouts:");
    if (kept) {
      const chosen = new URLSearchParams(location.hash.slice("#rollouts:".length));
      choose(+(chosen.get("run") || 0));
      for (const [name, value] of chosen) if (field[name]) field[name].value = value;
    }
    form.hidden = false;
    update();
    if (kept) $("rollouts").scrollIntoView();
    let timer = 0;
    form.addEventListener("input", (event) => {
      clearTimeout(timer);
      timer = setTimeout(update, event.target.type === "search" ? 200 : 0);
    });
    form.addEventListener("reset", () => {
      const number = runs.indexOf(run);
      setTimeout(() => { field.run.value = number; update(); }, 0);
    });
    form.addEventListener("submit", (event) => event.preventDefault());
    page.addEventListener("change", () => { at = page.value - 1; draw(); });
    pages.addEventListener("click", (event) => {
      const go = event.target.dataset.go;
      if (!go) return;
      at = { first: 0, back: at - 1, next: at + 1, end: Infinity }[go];
      draw();
      $("count").scrollIntoView({ block: "nearest" });
    });
  }

  // After the first paint: reading some megabytes of JSON must not hold it up.
  requestAnimationFrame(() => setTimeout(start, 0));
})();
