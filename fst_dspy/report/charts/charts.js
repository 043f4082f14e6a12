"use strict";
// The charts: uPlot over the numbers that each figure carries. Texts only ever become text nodes,
// or pixels of a canvas.
(() => {
  const HEIGHT = 232, FONT = "12px system-ui,sans-serif", DASHED = 6;
  const figures = [...document.querySelectorAll("figure[data-chart]")];
  const drawn = new Map();
  const number = (v) => {
    if (v === null || v === undefined) return "—";
    const size = Math.abs(v);
    if (size >= 1e4 && Number.isInteger(v)) return v.toLocaleString("en");
    return size !== 0 && (size < 1e-3 || size >= 1e6) ? (+v.toPrecision(3)).toExponential() : String(+v.toPrecision(4));
  };
  const tick = (v) => {
    if (Math.abs(v) >= 1e9) return (+v.toPrecision(3)).toExponential();
    if (Math.abs(v) >= 1e6) return `${+(v / 1e6).toPrecision(4)}M`;
    if (Math.abs(v) >= 1e4) return `${+(v / 1e3).toPrecision(4)}k`;
    return v !== 0 && Math.abs(v) < 1e-3
      ? (+v.toPrecision(3)).toExponential() : String(+v.toPrecision(4));
  };

  function colours() {
    const style = getComputedStyle(document.documentElement);
    return (name) => style.getPropertyValue(`--${name}`).trim();
  }
  const nameOf = (line) => (typeof line.colour === "number" ? `c${line.colour % DASHED}` : line.colour);

  // Bars upon one another: each series is the sum of its own part and those below it, the highest
  // drawn first.
  function stacked(chart) {
    const sums = chart.xs.map(() => 0);
    return chart.lines.map((line) => line.ys.map((y, n) => (sums[n] += y || 0)));
  }

  class Chart {
    constructor(figure) {
      this.figure = figure;
      this.chart = JSON.parse(figure.dataset.chart);
      this.zoomed = null; // the part of y that is shown, and of x
      this.across = null;
      this.box = document.createElement("div");
      this.box.className = "plot";
      this.box.tabIndex = 0;
      this.box.setAttribute("role", "application");
      this.box.setAttribute("aria-roledescription", "chart");
      this.box.setAttribute("aria-label", `${this.chart.y} against ${this.chart.x}. Arrow keys read `
        + "the values, plus and minus zoom, 0 shows the whole; tables have the same figures");
      this.told = document.createElement("p");
      this.told.className = "read";
      this.told.setAttribute("aria-live", "polite");
      this.hint = `${this.chart.x}`;
      this.told.textContent = this.hint;
      figure.append(this.box, this.told);
      this.box.addEventListener("keydown", (event) => this.key(event));
    }

    ends() {
      const { xs, kind } = this.chart, low = xs[0], high = xs[xs.length - 1];
      const pad = kind === "stack" || low === high ? 0.6 : 0;
      return [low - pad, high + pad];
    }

    show(low, high) {
      const [first, last] = this.ends();
      this.across = low <= first && high >= last ? null : [Math.max(low, first), Math.min(high, last)];
      const [min, max] = this.across ?? [first, last];
      this.plot.setScale("x", { min, max });
    }

    range(u, low, high) {
      if (this.zoomed) return this.zoomed;
      const chart = this.chart;
      if (low === null) return [chart.low ?? 0, chart.high ?? 1];
      const width = high - low || Math.abs(high) || 1;
      let bottom = low - 0.06 * width, top = high + 0.06 * width;
      if (low >= 0 && bottom < 0) bottom = 0;
      if (high <= 0 && top > 0) top = 0;
      if (chart.kind === "stack") bottom = 0;
      if (chart.low !== undefined && chart.low <= low) bottom = chart.low;
      if (chart.high !== undefined && chart.high >= high) top = chart.high;
      return [bottom, top > bottom ? top : bottom + 1];
    }

    options(width) {
      const { chart } = this, colour = colours(), stack = chart.kind === "stack";
      const data = [chart.xs], series = [{}], bands = [];
      this.own = [];
      const lines = chart.lines.map((line, n) => [line, stack ? null : line.ys, n]);
      if (stack) {
        stacked(chart).forEach((sums, n) => { lines[n][1] = sums; });
        lines.reverse();
      }
      const alone = (ys) => ys.filter((y) => y !== null).length === 1;
      for (const [line, ys, n] of lines) {
        const stroke = colour(nameOf(line));
        this.own.push([line, data.length]);
        data.push(ys);
        series.push({
          stroke,
          width: chart.kind === "path" ? 0 : stack ? 0 : 1.8,
          fill: stack ? stroke : undefined,
          dash: line.colour >= DASHED ? [6, 4] : undefined,
          spanGaps: true,
          paths: stack ? uPlot.paths.bars({ size: [0.7, 48] }) : undefined,
          points: {
            show: !stack && ys.filter((y) => y !== null).length <= (line.names ? 40 : 12),
            size: 6, width: 1.6, fill: colour("bg"), stroke,
          },
        });
        if (!line.lo) continue;
        for (const edge of [line.hi, line.lo]) {
          data.push(edge);
          series.push({ stroke: "transparent", width: 0, spanGaps: true, points: { show: false } });
        }
        bands.push({ series: [data.length - 2, data.length - 1], fill: `${stroke}26` });
      }
      const labelled = chart.kind === "lines" && chart.lines.length > 1;
      const margin = labelled ? this.margin(width) : 12;
      const axis = {
        stroke: colour("soft"), font: FONT, grid: { stroke: colour("line"), width: 1 },
        ticks: { show: false }, values: (u, values) => values.map((v) => (v === null ? "" : tick(v))),
      };
      const whole = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 1e6];
      const options = {
        width, height: HEIGHT, series, bands, padding: [10, margin, 0, 0], legend: { show: false },
        scales: {
          x: {
            time: false,
            range: () => this.across ?? this.ends(),
          },
          y: { range: (u, low, high) => this.range(u, low, high) },
        },
        axes: [
          { ...axis, size: 26, gap: 4, space: 46, ...(chart.whole ? { incrs: whole } : {}) },
          { ...axis, size: 50, gap: 4, space: 34 },
        ],
        cursor: {
          drag: { x: true, y: true, uni: 24, setScale: false },
          hover: { skip: [null, undefined] },
          points: { size: 8, show: !stack },
          bind: { dblclick: () => () => { this.whole(); return null; } },
        },
        hooks: {
          setCursor: [(u) => this.read(u)],
          setSelect: [(u) => this.select(u)],
          draw: [(u) => {
            if (chart.kind === "path") this.path(u, colour);
            else if (!stack) this.whiskers(u, colour, alone);
            if (labelled) this.labels(u, colour, margin);
          }],
        },
      };
      return [options, data];
    }

    margin(width) {
      const context = document.createElement("canvas").getContext("2d");
      context.font = FONT;
      const widest = Math.max(...this.chart.lines.map((l) => context.measureText(l.label).width));
      return Math.min(widest + 10, 0.28 * width);
    }

    draw(width) {
      if (this.plot && this.width === width) return;
      this.width = width;
      if (this.plot && this.chart.lines.length === 1) {
        this.plot.setSize({ width, height: HEIGHT });
        return;
      }
      this.again();
    }

    again() {
      this.plot?.destroy();
      this.plot = new uPlot(...this.options(this.width), this.box);
      this.read(this.plot);
    }

    // What a chart says at the pointer, or where the arrow keys are.
    read(u) {
      const at = u.cursor.idx;
      if (at === null || at === undefined) {
        this.told.textContent = this.hint;
        return;
      }
      const { chart } = this, several = chart.lines.length > 1;
      const says = chart.lines.map((line) => {
        const found = this.own.find(([one]) => one === line);
        const n = chart.kind === "stack" ? at : u.cursor.idxs?.[found[1]];
        if (n === null || n === undefined || line.ys[n] === null) return null;
        const bound = line.lo && line.lo[n] !== null
          ? ` (${number(line.lo[n])} to ${number(line.hi[n])})` : "";
        const elsewhere = chart.xs[n] === chart.xs[at] ? "" : `at ${number(chart.xs[n])}: `;
        const name = line.names?.[n] ? `${line.names[n]}: ` : elsewhere;
        return `${several ? `${line.label} ` : ""}${name}${number(line.ys[n])}${bound}`;
      }).filter((text) => text !== null);
      this.told.textContent = `${chart.x} ${number(chart.xs[at])} · ${says.join(" · ")}`;
    }

    select(u) {
      const { left, top, width, height } = u.select;
      if (width < 4 && height < 4) return;
      const across = u.over.clientWidth, down = u.over.clientHeight;
      if (height < down) this.zoomed = [u.posToVal(top + height, "y"), u.posToVal(top, "y")];
      const [low, high] = width < across
        ? [u.posToVal(left, "x"), u.posToVal(left + width, "x")] : [u.scales.x.min, u.scales.x.max];
      u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
      this.show(low, high);
    }

    whole() {
      this.zoomed = null;
      this.show(-Infinity, Infinity);
    }

    key(event) {
      const u = this.plot, { xs } = this.chart, last = xs.length - 1;
      if (!u || event.ctrlKey || event.metaKey || event.altKey) return;
      const at = u.cursor.idx ?? -1;
      const to = {
        ArrowRight: Math.min(at + 1, last), ArrowLeft: Math.max(at - 1, 0), Home: 0, End: last,
      }[event.key];
      if (to !== undefined) {
        if (xs[to] < u.scales.x.min || xs[to] > u.scales.x.max) this.whole();
        const move = () => u.setCursor({
          left: u.valToPos(xs[to], "x"), top: u.over.clientHeight / 2,
        });
        setTimeout(move, 0); // once the axis is as it was asked to be
      } else if (event.key === "+" || event.key === "=" || event.key === "-") {
        const { min, max } = u.scales.x, middle = at < 0 ? (min + max) / 2 : xs[at];
        const factor = event.key === "-" ? 2 : 0.5;
        const low = middle - (middle - min) * factor, high = middle + (max - middle) * factor;
        if (high > low) this.show(low, high);
      } else if (event.key === "0" || event.key === "Escape") this.whole();
      else return;
      event.preventDefault();
    }

    clipped(u, work) {
      const { ctx } = u, { left, top, width, height } = u.bbox;
      ctx.save();
      ctx.beginPath();
      ctx.rect(left, top, width, height);
      ctx.clip();
      work(ctx);
      ctx.restore();
    }

    // Points in the order in which they came, whatever way x goes.
    path(u, colour) {
      this.clipped(u, (ctx) => {
        for (const [line] of this.own) {
          ctx.strokeStyle = `${colour(nameOf(line))}99`;
          ctx.lineWidth = 1.4 * devicePixelRatio;
          ctx.beginPath();
          line.order.forEach((n, step) => {
            const x = u.valToPos(this.chart.xs[n], "x", true), y = u.valToPos(line.ys[n], "y", true);
            if (step) ctx.lineTo(x, y);
            else ctx.moveTo(x, y);
          });
          ctx.stroke();
        }
      });
    }

    // A band needs two points; one has a whisker.
    whiskers(u, colour, alone) {
      this.clipped(u, (ctx) => {
        for (const [line] of this.own) {
          if (!line.lo || !alone(line.ys)) continue;
          const n = line.ys.findIndex((y) => y !== null), x = u.valToPos(this.chart.xs[n], "x", true);
          ctx.strokeStyle = colour(nameOf(line));
          ctx.lineWidth = devicePixelRatio;
          ctx.beginPath();
          ctx.moveTo(x, u.valToPos(line.lo[n], "y", true));
          ctx.lineTo(x, u.valToPos(line.hi[n], "y", true));
          ctx.stroke();
        }
      });
    }

    // Each line's name at its end, moved apart where they would lie on one another.
    labels(u, colour, margin) {
      const { ctx } = u, ratio = devicePixelRatio, step = 14 * ratio;
      const { left, top, width, height } = u.bbox;
      const places = this.own.map(([line]) => {
        let n = line.ys.length - 1;
        while (n > 0 && (line.ys[n] === null || this.chart.xs[n] > u.scales.x.max)) n -= 1;
        return { line, y: u.valToPos(line.ys[n] ?? 0, "y", true) };
      }).sort((a, b) => a.y - b.y);
      places.forEach((p, n) => {
        p.y = Math.max(p.y, n ? places[n - 1].y + step : top + step / 2);
      });
      for (let n = places.length - 1, edge = top + height; n >= 0; n -= 1) {
        places[n].y = Math.min(places[n].y, edge);
        edge = places[n].y - step;
      }
      ctx.save();
      ctx.font = `${12 * ratio}px system-ui,sans-serif`;
      ctx.textBaseline = "middle";
      ctx.textAlign = "left";
      for (const { line, y } of places) {
        ctx.fillStyle = colour(nameOf(line));
        let text = line.label;
        while (text.length > 1 && ctx.measureText(text).width > (margin - 6) * ratio) {
          text = `${text.replace(/…$/, "").slice(0, -1)}…`;
        }
        ctx.fillText(text, left + width + 5 * ratio, y);
      }
      ctx.restore();
    }
  }

  // A chart is made when it is first seen with a width: those in a closed part have none.
  const watcher = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries) {
      const width = Math.floor(contentRect.width);
      if (width > 60) drawn.get(target).draw(width);
    }
  });
  for (const figure of figures) {
    const chart = new Chart(figure);
    drawn.set(figure, chart);
    watcher.observe(figure);
  }
  const again = () => { for (const chart of drawn.values()) if (chart.plot) chart.again(); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);

  // Tables that sort by any of their columns.
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") !== "descending";
        heads.forEach((one) => one.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
        const rows = [...table.tBodies[0].rows].sort((a, b) => {
          const [x, y] = [value(a), value(b)], less = x !== "" && y !== "" ? x - y : NaN;
          return Number.isNaN(less) ? x.localeCompare(y, "en", { numeric: true }) : less;
        });
        table.tBodies[0].replaceChildren(...(down ? rows.reverse() : rows));
      });
    });
  }
})();
