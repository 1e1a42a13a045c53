// A list of any length that holds the few rows in sight: rows are given another place and text as it scrolls.

const ROW_HEIGHT = 56, SPARE_ROWS = 4;

class LongList {
  // fill(node, entry): shows an entry in a row. chosen(entry): called when one is chosen.
  constructor(label, fill, chosen) {
    this.fill = fill;
    this.chosen = chosen;
    this.entries = [];
    this.selected = -1;
    this.pool = new Map(); // rows by place
    this.spacer = element("div", { role: "presentation" });
    this.node = element("div", { class: "list", role: "listbox", tabindex: "0", "aria-label": label }, this.spacer);
    this.node.addEventListener("scroll", () => this.render());
    this.node.addEventListener("keydown", (event) => this.key(event));
    this.node.addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (row) this.select(Number(row.dataset.at));
    });
    new ResizeObserver(() => this.render()).observe(this.node);
  }

  // Shows other entries; what was chosen stays chosen where it is among them.
  show(entries) {
    const before = this.entries[this.selected];
    this.entries = entries;
    this.selected = entries.indexOf(before);
    for (const row of this.pool.values()) row.remove();
    this.pool.clear();
    this.spacer.style.height = `${entries.length * ROW_HEIGHT}px`;
    this.node.scrollTop = this.selected > 0 ? this.selected * ROW_HEIGHT : 0;
    this.render();
  }

  select(at, quietly = false) {
    if (!this.entries.length) return;
    this.selected = Math.min(Math.max(at, 0), this.entries.length - 1);
    const top = this.selected * ROW_HEIGHT, height = this.node.clientHeight;
    if (top < this.node.scrollTop) this.node.scrollTop = top;
    else if (top + ROW_HEIGHT > this.node.scrollTop + height) this.node.scrollTop = top + ROW_HEIGHT - height;
    this.render();
    if (!quietly) this.chosen(this.entries[this.selected]);
  }

  key(event) {
    const page = Math.max(1, Math.floor(this.node.clientHeight / ROW_HEIGHT) - 1), last = this.entries.length - 1;
    const moves = { ArrowDown: this.selected + 1, ArrowUp: this.selected - 1, PageDown: this.selected + page, PageUp: this.selected - page, Home: 0, End: last };
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.select(moves[event.key]);
  }

  render() {
    const first = Math.max(0, Math.floor(this.node.scrollTop / ROW_HEIGHT) - SPARE_ROWS);
    const last = Math.min(this.entries.length, Math.ceil((this.node.scrollTop + this.node.clientHeight) / ROW_HEIGHT) + SPARE_ROWS);
    for (const [at, row] of this.pool) {
      if (at < first || at >= last) {
        row.remove();
        this.pool.delete(at);
      }
    }
    for (let at = first; at < last; at++) {
      let row = this.pool.get(at);
      if (!row) {
        row = element("div", { class: "row", role: "option", id: `document-${at}`, "data-at": at, "aria-setsize": this.entries.length, "aria-posinset": at + 1 });
        row.style.top = `${at * ROW_HEIGHT}px`;
        this.fill(row, this.entries[at]);
        this.pool.set(at, row);
        this.spacer.append(row);
      }
      row.setAttribute("aria-selected", String(at === this.selected));
    }
    if (this.pool.has(this.selected)) this.node.setAttribute("aria-activedescendant", `document-${this.selected}`);
    else this.node.removeAttribute("aria-activedescendant");
  }
}
