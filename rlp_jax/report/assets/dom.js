// Elements, numbers and data for the files after this one, which are joined into one script. Text goes into the page
// as text nodes only: the page's policy forbids markup from strings.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, listen] of Object.entries(value)) node.addEventListener(event, listen);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const element = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);
const shape = (tag, attributes, ...children) => build(document.createElementNS(SVG, tag), attributes, children);

// A number for a reader: so many digits after the point, a true minus, no sign on nought.
function figure(value, digits = 3, signed = true) {
  if (!Number.isFinite(value)) return "–";
  const text = Math.abs(value).toFixed(digits);
  if (!/[1-9]/.test(text)) return text;
  return (value < 0 ? "−" : signed ? "+" : "") + text;
}

// A number of unknown size: four digits that count.
function shortNumber(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e6 || size < 1e-3)) return value.toExponential(1).replace(/-/g, "−");
  return String(Number(value.toPrecision(4))).replace("-", "−");
}

// One of a row of buttons that stay pressed.
function toggle(label, pressed, change, ...before) {
  const button = element("button", { type: "button", "aria-pressed": String(pressed) }, ...before, label);
  button.addEventListener("click", () => change(button.getAttribute("aria-pressed") !== "true"));
  return button;
}

function choose(label, options, change) {
  const select = element("select", { "aria-label": label }, ...options.map(([value, text]) => element("option", { value }, text)));
  select.addEventListener("change", () => change(select.value));
  return select;
}

const data = JSON.parse(document.getElementById("data").textContent);
