"use strict";
// The overview of all bundles, and the pictures of each as examples to try. Uses what the page's own script defines.
const EVERY = 3000;  // milliseconds between two looks while the overview is open
const SHOWN = 6, EXAMPLES = 4, NAMED = 6;  // pictures on a card, examples of a bundle, classes by name
const ILLUSTRATED = 24;  // bundles with pictures: each one is a request
let before = null, drawn = "", looking = null;

const bytes = n => n < 1e6 ? `${(n / 1e3).toFixed(0)} KB` : `${(n / 1e6).toFixed(1)} MB`;
const place = ({name, version}) => `${encodeURIComponent(name)}/${encodeURIComponent(version)}`;

async function thumbnail(bundle, row) {
  return (await call(`v1/thumbnails/${place(bundle)}/${row}`)).blob();
}

function rows(bundle, count) {  // spread over the bank, which is sorted by the data set's order
  const least = Math.min(count, bundle.pictures);
  return Array.from({length: least}, (_, i) => Math.floor((i + 0.5) * bundle.pictures / least));
}

function classes({classes, number_of_classes: all}) {
  const more = all - Math.min(all, NAMED);
  return all ? classes.slice(0, NAMED).join(", ") + (more ? ` and ${more} more` : "") : "no labels";
}

function now(bundle, seconds) {  // since the last look
  const last = before?.bundles.find(b => b.name === bundle.name && b.version === bundle.version);
  const images = bundle.images - (last?.images ?? bundle.images), took = bundle.seconds - (last?.seconds ?? 0);
  const so_far = `${bundle.images.toLocaleString("en")} images so far, now `;
  return so_far + (images > 0 ? `${(images / seconds).toFixed(1)} a second, ${(1000 * took / images).toFixed(0)} ms each` : "idle");
}

function card(bundle, index) {
  const box = element("section"), title = element("h2", bundle.name + " "), strip = element("div");
  title.append(element("small", bundle.version));
  strip.className = "strip";
  const images = index < ILLUSTRATED ? rows(bundle, SHOWN) : [];
  Promise.all(images.map(row => thumbnail(bundle, row))).then(
    files => strip.append(...files.map(file => picture(file, ""))), error => { strip.textContent = error.message; });
  const {of, value} = bundle.accuracy ?? {}, near = of === "nearest neighbors" ? ", by nearest neighbors" : "";
  const measured = bundle.accuracy && `${percent(value)} of held-out images right${near}`;
  const about = [measured, bytes(bundle.bytes), `${bundle.size} px`, bundle.masks > 1 && `${bundle.masks} masks`,
    !bundle.dispatched && "asked by name only"];
  const live = element("p"), button = element("button", "Try it");
  live.className = "live";
  button.setAttribute("aria-label", `Try ${bundle.name} ${bundle.version}`);
  button.onclick = () => {
    const value = JSON.stringify([bundle.name, bundle.version]);
    if ([...$("bundle").options].some(option => option.value === value)) $("bundle").value = value;
    view("try");
    attempt(show);
  };
  box.append(title, ...(images.length ? [strip] : []), element("p", classes(bundle)),
    element("p", about.filter(Boolean).join(" · ")), live, button);
  return box;
}

function examples(bundles) {
  const title = element("h2", "Examples, from the training images");
  $("examples").hidden = !bundles.some(b => b.pictures);
  $("examples").replaceChildren(title, ...bundles.filter(b => b.pictures).slice(0, ILLUSTRATED / 2).map(bundle => {
    const group = element("div"), strip = element("div");
    strip.className = "strip";
    group.append(element("h3", bundle.name), strip);
    for (const row of rows(bundle, EXAMPLES)) {
      const button = element("button");
      button.setAttribute("aria-label", `Example ${row} of ${bundle.name}`);
      strip.append(button);
      thumbnail(bundle, row).then(file => {
        button.append(picture(file, ""));
        button.onclick = () => choose(file);
      }, error => { button.textContent = error.message; });
    }
    return group;
  }));
}

async function look() {
  clearTimeout(looking);
  try {
    const [found] = await ask("v1/overview");
    found.at = performance.now();
    const all = JSON.stringify(found.bundles.map(({name, version, pictures}) => [name, version, pictures]));
    if (all !== drawn) {  // pictures are fetched once
      $("cards").replaceChildren(...found.bundles.map(card));
      examples(found.bundles.filter(({name, version}, i) => found.bundles[i + 1]?.name !== name));  // the latest
      drawn = all;
    }
    const seconds = before ? (found.at - before.at) / 1000 : 1, {backbone, packed, materialized} = found.memory;
    const backbones = [...new Set(found.bundles.map(b => b.backbone))].join(", ");
    $("server").textContent = `${found.bundles.length + found.more} bundles over ${backbones || "no backbone"}: ` +
      `backbone ${bytes(backbone)} once, all bundles ${bytes(packed)}, weights ready to run ${bytes(materialized)}` +
      (found.more ? `; ${found.more} are not shown` : "");
    found.bundles.forEach((bundle, i) => { $("cards").children[i].querySelector(".live").textContent = now(bundle, seconds); });
    $("trouble").textContent = "";
    before = found;
  } catch (error) {
    $("trouble").textContent = error.message;
  }
  if (!$("overview").hidden) looking = setTimeout(look, EVERY);
}

function view(name) {
  for (const button of document.querySelectorAll("nav button")) {
    if (button.dataset.view === name) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
    $(button.dataset.view).hidden = button.dataset.view !== name;
  }
  if (name === "overview") look();
}

for (const button of document.querySelectorAll("nav button")) button.onclick = () => view(button.dataset.view);
look();
