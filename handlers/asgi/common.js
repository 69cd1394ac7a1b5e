"use strict";
// What all views share: requests with the key, pictures, bars, and the change of views.
const $ = id => document.getElementById(id);
const COLORS = ["#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e0a800", "#439894", "#9d755d", "#8a63c9", "#d67195", "#79706e"];
const views = {};  // what to do when a view is opened, by name

const element = (name, text, more) => Object.assign(document.createElement(name), {textContent: text ?? "", ...more});
const percent = x => (100 * x).toFixed(x < 0.1 ? 1 : 0) + " %";
const bytes = n => n < 1e6 ? `${(n / 1e3).toFixed(0)} KB` : `${(n / 1e6).toFixed(1)} MB`;
const place = ({name, version}) => `${encodeURIComponent(name)}/${encodeURIComponent(version)}`;

async function call(path, options = {}) {
  const key = $("key").value;
  const headers = {...options.headers, ...(key ? {Authorization: "Bearer " + key} : {})};
  const response = await fetch(path, {...options, headers});
  if (response.ok) return response;
  const {error} = await response.json();
  throw Object.assign(new Error(error.message ?? error), {kind: error.kind});
}

async function ask(path, options) {
  const response = await call(path, options);
  return [await response.json(), response.headers];
}

async function thumbnail(bundle, row, signal) {
  return (await call(`v1/thumbnails/${place(bundle)}/${row}`, {signal})).blob();
}

function picture(file, alt) {
  const image = Object.assign(new Image(), {src: URL.createObjectURL(file), alt});
  image.onload = () => URL.revokeObjectURL(image.src);
  return image;
}

function bar(...parts) {  // shares, each [0 to 1, class]
  const whole = element("span", "", {className: "bar"});
  whole.append(...parts.map(([share, name]) => {
    const fill = element("i", "", {className: name ?? ""});
    fill.style.width = 100 * Math.max(0, Math.min(1, share)) + "%";
    return fill;
  }));
  return whole;
}

function row(...cells) {
  const made = element("div", "", {className: "row"});
  made.append(...cells.map(cell => cell instanceof Node ? cell : element("span", cell)));
  return made;
}

function bars(where, rows, none) {
  where.replaceChildren(...rows.map(([name, share]) => row(name, bar([share]), share.toFixed(2))));
  if (!rows.length) where.textContent = none;
}

function facts(where, rows) {  // values are texts or elements
  where.replaceChildren(...rows.flatMap(([name, ...values]) => {
    const value = element("dd");
    value.append(...values);
    return [element("dt", name), value];
  }));
}

function legend(where, entries) {  // each [name, color]
  where.replaceChildren(...entries.map(([name, color]) => {
    const entry = element("span"), mark = element("b", "●");
    mark.style.color = color;
    entry.append(mark, name);
    return entry;
  }));
}

function view(name) {
  for (const button of document.querySelectorAll("nav button")) {
    if (button.dataset.view === name) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
    $(button.dataset.view).hidden = button.dataset.view !== name;
  }
  views[name]?.();
}

for (const button of document.querySelectorAll("nav button")) button.onclick = () => view(button.dataset.view);
