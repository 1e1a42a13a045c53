// Curves, drawn from data.figures: a panel a set of axes, a reading at the pointer or by arrow keys, buttons that hide
// a curve, and the same numbers as a table.

const LEFT = 58, RIGHT = 12, TOP = 18, HEIGHTS = { 1: 240, 2: 150 };
const SMOOTH_FROM = 40, MARKED = 30, TABLE_ROWS = 200;

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((k) => k * power).find((size) => size >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step);
  return found;
}

function runningMean(values) {
  const reach = Math.max(1, Math.floor(values.length / 30));
  return values.map((_, i) => {
    const near = values.slice(Math.max(0, i - reach), i + reach + 1);
    return near.reduce((sum, value) => sum + value, 0) / near.length;
  });
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)];
}

// The range of a panel's values: [low, high, logarithmic].
function range(panel, curves) {
  const values = curves.flatMap((curve) => [...curve.y, ...(curve.low || []), ...(curve.high || [])]).filter(Number.isFinite);
  if (!values.length) return [0, 1, false];
  const smallest = Math.min(...values), largest = Math.max(...values);
  if (panel.log && smallest > 0 && largest > 10 * smallest) return [smallest / 1.3, largest * 1.3, true];
  let low = panel.low ?? smallest, high = panel.high ?? largest;
  if (panel.zero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
  if (panel.robust) high = Math.min(high, 3 * Math.max(...curves.map((curve) => median(curve.y))) || high);
  if (high <= low) high = low + (Math.abs(low) || 1);
  const room = 0.05 * (high - low);
  return [low - room, high + room, false];
}

function curveColor(curve, several) {
  const colors = ["blue", "orange", "green", "red", "purple"];
  return `var(--${several ? colors[curve.run % colors.length] : curve.color === "ink" ? "ink" : curve.color})`;
}

function curveName(curve, several, alone) {
  return several ? (alone ? curve.of : `${curve.of}: ${curve.label}`) : curve.label;
}

class FigureView {
  constructor(spec, several) {
    this.spec = spec;
    this.several = several;
    this.hidden = new Set();
    this.steps = [...new Set(spec.panels.flatMap((panel) => panel.curves.flatMap((curve) => curve.x)))].sort((a, b) => a - b);
    this.at = null;
    this.reading = element("p", { class: "reading", role: "status" });
    this.canvas = element("div");
    this.node = element("figure", { class: "figure", id: `figure-${spec.name}` },
      element("figcaption", null, spec.title), this.legend(), this.canvas, this.reading, this.table());
    new ResizeObserver(([entry]) => {
      if (Math.abs(entry.contentRect.width - (this.width || 0)) < 1) return;
      this.width = Math.max(entry.contentRect.width, 200);
      this.draw();
      this.read(this.at);
    }).observe(this.canvas);
    this.width = 560;
    this.draw();
    this.read(null);
  }

  curves(panel) {
    return panel.curves.filter((curve) => !this.hidden.has(this.name(panel, curve)));
  }

  name(panel, curve) {
    return curveName(curve, this.several, this.spec.panels.length === 1 && panel.curves.every((other) => other.label === curve.label));
  }

  stroke(curve, several = this.several) {
    const line = { stroke: curveColor(curve, several) };
    if (curve.dash.length) line["stroke-dasharray"] = curve.dash.map((part) => 2 * part).join(" ");
    return line;
  }

  legend() {
    const box = element("div", { class: "legend", role: "group", "aria-label": "curves shown" });
    const bands = new Set();
    for (const panel of this.spec.panels) {
      for (const curve of panel.curves) {
        const name = this.name(panel, curve);
        const line = shape("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }, shape("path", { d: "M1 5H25", class: "curve", ...this.stroke(curve) }));
        const button = toggle(name, true, (on) => {
          this.hidden[on ? "delete" : "add"](name);
          button.setAttribute("aria-pressed", String(on));
          this.draw();
          this.read(this.at);
        }, line);
        box.append(button);
        if (curve.band) bands.add(curve.band);
      }
    }
    if (bands.size) box.append(element("small", null, `shaded: ${[...bands].join(", ")}`));
    return box;
  }

  draw() {
    const { panels, title } = this.spec, height = HEIGHTS[panels.length] || 130, gap = 30;
    const total = panels.length * (height + gap) - gap + 38, WIDTH = this.width;
    const first = this.steps[0], last = this.steps[this.steps.length - 1], span = last - first || 1;
    const x = (step) => LEFT + ((step - first) / span) * (WIDTH - LEFT - RIGHT);
    const svg = shape("svg", {
      viewBox: `0 0 ${WIDTH} ${total}`, role: "img", tabindex: "0",
      "aria-label": `${title}. Arrow keys read the values step by step.`,
    });
    this.scales = [];
    panels.forEach((panel, number) => {
      const top = TOP + number * (height + gap), bottom = top + height - TOP, curves = this.curves(panel);
      const [low, high, log] = range(panel, curves), ln = Math.log, lowest = number === panels.length - 1;
      const y = (value) => {
        const part = log ? (ln(value) - ln(low)) / (ln(high) - ln(low)) : (value - low) / (high - low);
        return bottom - Math.min(Math.max(part, -0.02), 1.02) * (bottom - top);
      };
      this.scales.push({ panel, y, top, bottom });
      svg.append(shape("text", { x: LEFT, y: top - 6 }, panel.label));
      const marks = log ? ticks(Math.log10(low), Math.log10(high), 4).filter(Number.isInteger).map((power) => 10 ** power) : ticks(low, high, panels.length > 1 ? 4 : 6);
      for (const mark of marks) {
        svg.append(shape("path", { d: `M${LEFT} ${y(mark)}H${WIDTH - RIGHT}`, class: panel.zero && mark === 0 ? "zero" : "grid" }));
        svg.append(shape("text", { x: LEFT - 7, y: y(mark) + 4, "text-anchor": "end" }, shortNumber(mark)));
      }
      svg.append(shape("path", { d: `M${LEFT} ${bottom}H${WIDTH - RIGHT}`, class: "axis" }));
      for (const step of ticks(first, last, 6).filter(Number.isInteger)) {
        svg.append(shape("path", { d: `M${x(step)} ${bottom}v4`, class: "axis" }));
        if (lowest) svg.append(shape("text", { x: x(step), y: bottom + 18, "text-anchor": "middle" }, String(step)));
      }
      if (lowest) svg.append(shape("text", { x: WIDTH - RIGHT, y: bottom + 32, "text-anchor": "end" }, "step"));
      for (const step of panel.skipped) svg.append(shape("path", { d: `M${x(step)} ${bottom}v-10`, class: "skipped" }, shape("title", null, `step ${step} skipped`)));
      for (const curve of curves) this.drawCurve(svg, curve, x, y);
    });
    this.cursor = shape("path", { class: "cursor" });
    svg.append(this.cursor);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      this.read(this.nearest(first + (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * span));
    });
    svg.addEventListener("pointerleave", () => this.read(null));
    svg.addEventListener("keydown", (event) => this.key(event));
    svg.addEventListener("blur", () => this.read(null));
    this.x = x;
    const focused = this.canvas.contains(document.activeElement);
    this.canvas.replaceChildren(svg);
    if (focused) svg.focus();
  }

  drawCurve(svg, curve, x, y) {
    const line = this.stroke(curve), path = (values) => "M" + values.map((value, i) => `${x(curve.x[i]).toFixed(1)} ${y(value).toFixed(1)}`).join("L");
    if (curve.low) {
      const there = curve.x.map((_, i) => i).filter((i) => curve.low[i] !== null && curve.high[i] !== null);
      const edge = (values, order) => order.map((i) => `${x(curve.x[i]).toFixed(1)} ${y(values[i]).toFixed(1)}`).join("L");
      if (there.length) svg.append(shape("path", { d: `M${edge(curve.high, there)}L${edge(curve.low, [...there].reverse())}Z`, class: "band", fill: line.stroke }));
    }
    const noisy = curve.y.length >= SMOOTH_FROM;
    if (noisy) svg.append(shape("path", { d: path(curve.y), class: "raw", stroke: line.stroke }));
    svg.append(shape("path", { d: path(noisy ? runningMean(curve.y) : curve.y), class: "curve", ...line }));
    if (curve.y.length <= MARKED) curve.y.forEach((value, i) => svg.append(shape("circle", { cx: x(curve.x[i]), cy: y(value), r: 2.6, fill: line.stroke })));
  }

  nearest(step) {
    let best = 0;
    this.steps.forEach((other, i) => { if (Math.abs(other - step) < Math.abs(this.steps[best] - step)) best = i; });
    return best;
  }

  key(event) {
    const last = this.steps.length - 1, at = this.at;
    const moves = { ArrowRight: at === null ? 0 : Math.min(at + 1, last), ArrowLeft: at === null ? last : Math.max(at - 1, 0), Home: 0, End: last, Escape: null };
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.read(moves[event.key]);
  }

  // Shows the values at a step, by its place in `steps`.
  read(at) {
    this.at = at;
    if (at === null) {
      const means = Math.max(...this.spec.panels.flatMap((panel) => panel.curves.map((curve) => curve.mean_of)));
      this.cursor.removeAttribute("d");
      this.reading.replaceChildren(means > 1 ? `Each point is the mean of ${means} steps.` : "");
      return;
    }
    const step = this.steps[at], lines = [];
    for (const { panel } of this.scales) {
      for (const curve of this.curves(panel)) {
        const i = curve.x.indexOf(step);
        if (i < 0) continue;
        const band = curve.low && curve.low[i] !== null ? ` [${shortNumber(curve.low[i])}, ${shortNumber(curve.high[i])}]` : "";
        lines.push(`${this.name(panel, curve)} ${shortNumber(curve.y[i])}${band}`);
      }
    }
    this.cursor.setAttribute("d", this.scales.map(({ top, bottom }) => `M${this.x(step)} ${top}V${bottom}`).join(""));
    this.reading.replaceChildren(`step ${shortNumber(step)}: ${lines.join(" · ")}`);
  }

  table() {
    const details = element("details", null, element("summary", null, "As a table"));
    details.addEventListener("toggle", () => {
      if (!details.open || details.querySelector("table")) return;
      const curves = this.spec.panels.flatMap((panel) => panel.curves.map((curve) => [this.name(panel, curve), curve]));
      const every = Math.ceil(this.steps.length / TABLE_ROWS), shown = this.steps.filter((_, i) => i % every === 0 || i === this.steps.length - 1);
      const cell = (curve, step) => {
        const i = curve.x.indexOf(step);
        const band = i >= 0 && curve.low && curve.low[i] !== null ? element("small", null, `${shortNumber(curve.low[i])} to ${shortNumber(curve.high[i])}`) : null;
        return element("td", null, i < 0 ? "–" : shortNumber(curve.y[i]), band);
      };
      const head = element("tr", null, element("th", { scope: "col" }, "step"), ...curves.map(([name]) => element("th", { scope: "col" }, name)));
      const body = shown.map((step) => element("tr", null, element("th", { scope: "row" }, shortNumber(step)), ...curves.map(([, curve]) => cell(curve, step))));
      const table = element("table", null, element("caption", { class: "soft" }, every > 1 ? `every ${every}th point` : this.spec.title), element("thead", null, head), element("tbody", null, ...body));
      details.append(element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${this.spec.title}, table` }, table));
    });
    return details;
  }
}

if (data.figures.length) {
  const several = data.runs.length > 1;
  document.getElementById("curves").append(...data.figures.map((spec) => new FigureView(spec, several).node));
}
