"use strict";
// The overview of all bundles, and the pictures of each as examples to try.
const EVERY = 3000;  // milliseconds between two looks while the overview is open
const SHOWN = 6, EXAMPLES = 4, NAMED = 6;  // pictures on a card, examples of a bundle, classes by name
const DRIFTS = 0.25, ENOUGH = 100;  // share of unusual images that means drift, of more than so many
const ILLUSTRATED = 24;  // bundles with pictures: each one is a request
let before = null, drawn = "", looking = null;

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
  const so_far = `${bundle.images.toLocaleString("en")} image${bundle.images === 1 ? "" : "s"} so far, now `;
  return so_far + (images > 0 ? `${(images / seconds).toFixed(1)} a second, ${(1000 * took / images).toFixed(0)} ms each` : "idle");
}

function drift(box, {loaded, out_of_domain, unusual, images}) {  // like the alert: deploy/prometheus/alerts.yml
  const share = images ? unusual / images : 0;
  box.classList.toggle("drifts", share > DRIFTS && images > ENOUGH);
  box.textContent = !loaded ? "" : !out_of_domain ? "drift not known: no out-of-domain score" : !images ? "drift not known: no images yet"
    : `${unusual.toLocaleString("en")} of them unusual, ${percent(share)}; 5 % are normal`;
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
    !bundle.dispatched && "asked by name only", !bundle.loaded && "not in memory: its first image loads it"];
  const actions = element("div", "", {className: "actions"}), own = JSON.stringify([bundle.name, bundle.version]);
  const button = (text, label, onclick) => {
    const made = element("button", text, {className: "action", onclick});
    made.setAttribute("aria-label", `${label} ${bundle.name} ${bundle.version}`);
    actions.append(made);
  };
  button("Try it", "Try", () => {
    if ([...$("bundle").options].some(option => option.value === own)) $("bundle").value = own;
    view("try");
    attempt(show);
  });
  button("Look inside", "Look inside", () => { wanted = own; view("inside"); });
  box.append(title, ...(images.length ? [strip] : []), element("p", classes(bundle)),
    element("p", about.filter(Boolean).join(" · ")), element("p", "", {className: "live"}),
    element("p", "", {className: "drift"}), actions);
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
        button.onclick = () => choose([file]);
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
    const all = JSON.stringify(found.bundles.map(({name, version, loaded, pictures}) => [name, version, loaded, pictures]));
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
    found.bundles.forEach((bundle, i) => {
      const box = $("cards").children[i];
      box.querySelector(".live").textContent = now(bundle, seconds);
      drift(box.querySelector(".drift"), bundle);
    });
    $("trouble").textContent = "";
    before = found;
  } catch (error) {
    $("trouble").textContent = error.message;
  }
  if (!$("overview").hidden) looking = setTimeout(look, EVERY);
}

views.overview = look;
look();
