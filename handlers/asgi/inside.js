"use strict";
// Look inside: what a bundle's masks switch off, the map of its bank, its clusters with pictures, and how sure it is.
const GROUPS = 24, EACH = 8;  // clusters or classes with pictures, pictures of one
let wanted = null, opened = {}, dots = [], pointed = -1, looks = new AbortController();

const valueOf = bundle => JSON.stringify([bundle.name, bundle.version]);
const labeled = bundle => element("option", `${bundle.name} ${bundle.version}`, {value: valueOf(bundle)});

async function list() {  // the bundles to choose from; the choice is kept where it still exists
  const [{bundles}] = await ask("v1/overview"), before = wanted ?? $("looked").value;
  $("looked").replaceChildren(...bundles.map(labeled));
  if (bundles.some(bundle => valueOf(bundle) === before)) $("looked").value = before;
  wanted = null;
  opened = {bundles, bundle: bundles[$("looked").selectedIndex]};
}

async function openInside() {
  looks.abort();
  const {signal} = looks = new AbortController();
  for (const id of ["fault", "summary", "layers", "key-masks", "spot", "colors", "groups", "sure"]) $(id).replaceChildren();
  clearPlane($("plane"));
  [dots, pointed] = [[], -1];
  delete $("inside").dataset.shown;
  try {
    await list();
    if (!opened.bundle) { $("fault").textContent = "No bundle is loaded."; return; }
    choices();
    await Promise.all([masks(signal), bank(signal), sure(signal)]);
    $("inside").dataset.shown = opened.bundle.name;
  } catch (error) { if (!signal.aborted) $("fault").textContent = error.message; }
}

function choices() {  // masks of the bundle, and what to hold them against
  const name = i => i ? `expert-${i - 1}` : "dispatcher", {bundle, bundles} = opened, all = [...Array(bundle.masks).keys()];
  $("which").replaceChildren(...all.map(i => element("option", name(i))));
  $("which").parentNode.hidden = bundle.masks < 2;
  const own = bundle.masks > 1 ? all.map(i => element("option", `its ${name(i)}`, {value: JSON.stringify([bundle.name, bundle.version, name(i)])})) : [];
  const others = bundles.filter(other => other !== bundle && other.backbone === bundle.backbone);
  $("against").replaceChildren(element("option", "nothing", {value: ""}), ...own,
    ...others.map(other => element("option", `${other.name} ${other.version}`, {value: JSON.stringify([other.name, other.version, "dispatcher"])})));
}

async function masks(signal) {
  const other = $("against").value && JSON.parse($("against").value);
  const query = other ? "?" + new URLSearchParams({other: other[0], other_version: other[1], other_mask: other[2]}) : "";
  const [found] = await ask(`v1/masks/${place(opened.bundle)}/${$("which").value}${query}`, {signal});
  const sum = (layers, key) => layers.reduce((total, layer) => total + layer[key], 0);
  const share = (layers, key) => sum(layers, key) / (sum(layers, "weights") || 1);
  const stages = found.stages.map((name, i) => [name, found.layers.filter(({stage}) => stage === i)]).filter(([, own]) => own.length);
  const off = other ? layers => share(layers, "off") + share(layers, "other_off") - share(layers, "both_off") : layers => share(layers, "off");
  const full = Math.max(1e-9, ...found.layers.map(layer => off([layer])));  // the longest bar
  const parts = layers => {
    const both = other ? share(layers, "both_off") : 0;
    return [[(share(layers, "off") - both) / full], ...(other ? [[both / full, "both"], [(share(layers, "other_off") - both) / full, "second"]] : [])];
  };
  const numbers = layers => percent(share(layers, "off")) + (other ? ` | ${percent(share(layers, "other_off"))}` : "");
  const line = (name, layers) => row(name, bar(...parts(layers)), numbers(layers));
  $("summary").textContent = summary(found, other, sum, share);
  $("layers").replaceChildren(...stages.map(([name, layers]) => {
    const details = element("details"), head = element("summary"), inner = element("div");
    head.append(line(name, layers));
    inner.append(...layers.map(layer => line(layer.name.replace(name + ".", "").replace(/\.weight$/, ""), [layer])));
    details.append(head, inner);
    return details;
  }));
  const name = ([bundle, version, mask]) => `${bundle} ${version}${bundle === opened.bundle.name ? ", " + mask : ""}`;
  legend($("key-masks"), !other ? [] : [["only this one", "var(--main)"], ["both", "var(--both)"], [`only ${name(other)}`, "var(--second)"]]);
  $("layers").dataset.shown = `${$("which").value} ${$("against").value}`;
}

function summary({delta, other_delta, layers, stages, masks}, other, sum, share) {
  const mask = masks.find(({name}) => name === $("which").value), verb = delta ? "lowers" : "switches off";
  if (!layers.length) return mask.start >= stages.length ? "No mask: the plain backbone with a head of its own." : "The two masks cover no stage in common.";
  const all = sum(layers, "weights"), from = mask.start ? ` from ${stages[mask.start]} on` : "";
  const first = delta ? `A 1-bit delta: it lowers ${percent(share(layers, "off"))} of ${all.toLocaleString("en")} weights${from} and raises the others, each channel by an amount of its own.`
    : !sum(layers, "off") ? `It switches nothing off: it changes scales and shifts alone, over ${all.toLocaleString("en")} weights${from}.`
      : `It switches off ${percent(share(layers, "off"))} of ${all.toLocaleString("en")} weights${from}.`;
  if (!other) return `${first} Bars show the share of each stage; open one for its layers.`;
  const [a, b, both] = ["off", "other_off", "both_off"].map(key => sum(layers, key)), either = a + b - both;
  if (delta !== other_delta) return `${first} The other one ${other_delta ? "is a 1-bit delta and lowers" : "switches off"} ${percent(b / all)}: their bits mean different things.`;
  return `${first} The other one ${verb} ${percent(b / all)}; they differ in ${percent((either - both) / all)} of the weights, ` +
    `and ${percent(either ? both / either : 1)} of what either ${verb} is common to both.`;
}

async function bank(signal) {
  const answer = await ask(`v1/map/${place(opened.bundle)}`, {signal}).then(([map]) => map, error => {
    if (error.kind !== "no_bank") throw error;
    return null;
  });
  opened.map = answer;
  const by = answer ? ["labels", "clusters"].filter(name => answer[name].length) : [];
  $("color").replaceChildren(...by.map(name => element("option", name === "labels" ? "label" : "cluster", {value: name})));
  $("color").parentNode.hidden = by.length < 2;
  $("plane").hidden = !answer?.points.length;
  if (!answer) $("spot").textContent = "This bundle keeps no training images: there is nothing to map.";
  else if (!answer.points.length) $("spot").textContent = "This bundle was made without a map: cascade map adds one.";
  paint();
  await groups(signal);
}

function paint() {
  const map = opened.map, by = $("color").value || "labels";
  if (!map?.points.length) return;
  dots = drawPlane($("plane"), map, {by, only: pointed});
  const order = names(map, by);
  $("plane").setAttribute("aria-label", `map of ${map.points.length} training images${order.length ? `, colored by ${order.length} ${by}` : ""}; arrow keys go from one to the next`);
  legend($("colors"), order.map((name, i) => [groupName(by, name), COLORS[i % COLORS.length]]));
}

async function point(i) {  // tell which image a dot is
  if (i === pointed) return;
  pointed = i;
  paint();
  if (i < 0) { $("spot").replaceChildren(); return; }
  const {map, bundle} = opened, cluster = map.clusters.length ? `, cluster ${map.clusters[i]}` : "";
  $("spot").textContent = title(map, i) + cluster;
  if (!map.thumbnails) return;
  const file = await thumbnail(bundle, i);
  if (pointed === i) $("spot").prepend(picture(file, ""));
}

function typical(map, own) {  // the rows of a group, those in its middle first
  if (!map.points.length) return own;
  const middle = [0, 1].map(axis => own.reduce((sum, i) => sum + map.points[i][axis], 0) / own.length);
  const far = new Map(own.map(i => [i, Math.hypot(map.points[i][0] - middle[0], map.points[i][1] - middle[1])]));
  return own.toSorted((a, b) => far.get(a) - far.get(b));
}

async function groups(signal) {  // pictures of each cluster, or of each class
  const {map, bundle} = opened, by = map?.clusters.length ? "clusters" : "labels", order = map ? names(map, by) : [];
  if (!order.length) { $("groups").hidden = true; return; }
  $("groups").hidden = false;
  const rows = order.slice(0, GROUPS).map(name => [name, typical(map, map[by].map((own, i) => own === name ? i : -1).filter(i => i >= 0))]);
  const files = map.thumbnails ? await Promise.all(rows.map(([, own]) => Promise.all(own.slice(0, EACH).map(i => thumbnail(bundle, i, signal))))) : [];
  const left = order.length > GROUPS ? `, the first ${GROUPS} of ${order.length}` : "";
  $("groups").replaceChildren(element("h2", (by === "clusters" ? "Its clusters" : "Its classes") + left), ...rows.map(([name, own], k) => {
    const group = element("div"), strip = element("div", "", {className: "strip"});
    strip.append(...(files[k] ?? []).map((file, i) => picture(file, title(map, own[i]))));
    group.append(element("h3", `${groupName(by, name)}: ${own.length} of ${map.names.length}`), strip);
    return group;
  }));
}

async function sure(signal) {
  const [found] = await ask(`v1/reliability/${place(opened.bundle)}`, {signal});
  const blocks = [["labels", "Labels: the share that is right"], ["clusters", "Clusters: the share that stays the same in another view of the image"],
    ["dispatch", "Dispatch: the share of its own images that reaches it"]];
  const unmeasured = "Not measured when the bundle was made.";
  const missing = {labels: opened.bundle.number_of_classes ? unmeasured : "It has no labels.", clusters: opened.bundle.masks > 1 ? unmeasured : "It has no clusters.",
    dispatch: opened.bundle.dispatched ? "No other bundle here sees images of the same size." : "It has no domain, so requests must name it."};
  $("sure").replaceChildren(element("h2", "How sure it is, and how often it is right"), ...blocks.map(([name, heading]) => {
    const block = element("div", "", {className: "block"});
    block.append(element("h3", heading), ...(found[name] ? bins(found[name]) : [element("p", missing[name], {className: "soft"})]));
    return block;
  }));
}

function bins({counts, confidence, right}) {  // a histogram of the confidence beside the share that was right
  const all = counts.reduce((sum, n) => sum + n, 0), most = Math.max(...counts), head = row("confidence", `${all} images`, "", "share", "");
  head.classList.add("head");
  const rows = counts.map((n, i) => n && row(`${10 * i} to ${10 * (i + 1)} %`, bar([n / most]), String(n), bar([right[i], "both"]), percent(right[i])));
  const gap = counts.reduce((sum, n, i) => sum + n * Math.abs(confidence[i] - right[i]), 0) / all;
  return [head, ...rows.filter(Boolean), element("p", `On average its confidence is ${percent(gap)} off.`, {className: "soft"})];
}

const reopen = () => { if (!$("inside").hidden) openInside(); if (!$("improve").hidden) strangers(); };
const again = what => () => what(looks.signal).catch(error => { if (!looks.signal.aborted) $("fault").textContent = error.message; });
views.inside = openInside;
$("looked").onchange = openInside;
$("which").onchange = $("against").onchange = again(masks);
$("color").onchange = paint;
$("plane").onmousemove = event => again(() => point(nearestSpot($("plane"), dots, event)))();
$("plane").onkeydown = event => {
  const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
  if (!step || !dots.length) return;
  event.preventDefault();
  again(() => point((pointed + step + dots.length) % dots.length))();
};
