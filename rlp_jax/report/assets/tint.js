// Colours that say how much: blue above nought, orange below, stronger the further, and a line beneath in the same
// colour, so that nothing hangs on telling two hues apart by their lightness.

const FAINTEST = 0.12; // of the scale; what is smaller has no line beneath it

function tint(node, value, scale) {
  node.classList.remove("up", "down");
  node.style.backgroundColor = "";
  if (!Number.isFinite(value)) return node;
  const part = Math.min(Math.abs(value) / scale, 1);
  node.style.backgroundColor = `rgb(var(--${value < 0 ? "down" : "up"}) / calc(${part.toFixed(3)} * var(--most)))`;
  if (part > FAINTEST) node.classList.add(value < 0 ? "down" : "up");
  return node;
}

function scaleBar(scale, unit) {
  return element("div", { class: "scale" }, `−${shortNumber(scale)}`, element("span", { class: "bar", role: "img", "aria-label": `orange: below nought, blue: above` }), `+${shortNumber(scale)} ${unit}`);
}

function chip(value, scale, digits = 2) {
  return tint(element("span", { class: "chip" }, figure(value, digits)), value, scale);
}

// A token's text in an element of its own, so that one that overrides directions moves none of the others.
function tokenNode(text, attributes) {
  const kind = text === "" ? " nothing" : /^\s*\n\s*$/.test(text) ? " newline" : "";
  return element("span", { ...attributes, class: `token${kind}${attributes && attributes.class ? ` ${attributes.class}` : ""}` }, text);
}
