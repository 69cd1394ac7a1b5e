"use strict";
// Try: an image's answer, where it lies, the same by another bundle beside it, and the request as a program.
const UNKNOWN = 0.99;  // more unusual than so many of the training images
const UNUSUAL = 0.95;
const MOST = 32;  // images chosen at once
let chosen = null, answer = null, map = null, spots = [], going = new AbortController();

async function bundles(signal) {
  const [{models}] = await ask("v2/models", {signal});
  const options = () => models.flatMap(({name, versions}) => versions.toReversed().map(version =>
    element("option", `${name} ${version}`, {value: JSON.stringify([name, version])})));
  const auto = element("option", "the one that fits", {value: JSON.stringify(["auto", null])});
  const dispatches = models.length > 1 && await ask("v2/models/auto/ready", {signal}).then(() => true, () => false);
  $("bundle").replaceChildren(...(dispatches ? [auto] : []), ...options());
  $("second").replaceChildren(element("option", "nothing", {value: ""}), ...options());
}

async function predict([name, version], mode, signal) {
  const headers = {"Content-Type": "application/octet-stream", "X-Cascade-Bundle": name,
    "X-Cascade-Fields": "labels,neighbors", ...(version ? {"X-Cascade-Version": version} : {}),
    ...(mode ? {"X-Cascade-Mode": mode} : {})};
  const start = performance.now();
  const [found, timing] = await ask("v1/predict", {method: "POST", body: chosen, headers, signal});
  const server = /dur=([\d.]+)/.exec(timing.get("Server-Timing") ?? "")?.[1];
  return {...found, ms: performance.now() - start, server: Number(server)};
}

const loaded = ({bundle, version}) => before?.bundles.find(b => b.name === bundle && b.version === version);

function unusual(found) {  // the gauge of the out-of-domain score
  if (loaded(found)?.out_of_domain === false) return ["not known: this bundle has no score for it"];
  const text = found.ood >= UNKNOWN ? "yes: labels mean little here" : `no: ${percent(1 - found.ood)} of the training images are more unusual`;
  const gauge = element("meter", "", {min: 0, max: 1, low: UNUSUAL, high: UNKNOWN, optimum: 0, value: found.ood});
  gauge.setAttribute("aria-label", `more unusual than ${percent(found.ood)} of the training images`);
  return [gauge, text];
}

function about(found) {  // the facts of an answer
  const routed = [["cluster", String(found.cluster)], ["confidence", percent(found.confidence)]];
  const again = found.deferral?.deferred ? ", asked again: the smaller size was unsure" : "";
  const repeated = found.dispatch?.repeated_stages, likeliest = found.dispatch?.likely[0]?.name ?? found.bundle;
  const instead = likeliest === found.bundle ? "" : `, because its label is likelier than that of ${likeliest}`;
  return [...(loaded(found)?.masks === 1 ? [] : routed), ["out of domain", ...unusual(found)],
    ["masks", found.masks.join(" + ") + (repeated ? `; ${repeated} stages ran twice to find the bundle` : "")],
    ["cost", `${found.server.toFixed(0)} ms, ${found.ms.toFixed(0)} ms with the network`],
    ["answered by", `${found.bundle} ${found.version}, ${found.mode}${instead}`],
    ...(found.deferral ? [["input", `${found.deferral.input_size} px${again}`]] : [])];
}

async function show(signal) {
  if (!chosen || !$("bundle").value) return;
  const [name, version] = JSON.parse($("bundle").value), mode = $("mode").value;
  answer = await predict([name, version], mode, signal);
  facts($("facts"), about(answer));
  program(name, version, mode);
  $("labels").className = answer.ood >= UNKNOWN ? "muted" : "";
  $("dispatch").hidden = !answer.dispatch;
  bars($("likely"), (answer.dispatch?.likely ?? []).map(({name, score}) => [name, score]), "");
  bars($("labels"), answer.labels.map(({name, score}) => [name, score]), "This bundle has no labels.");
  $("neighbors").className = "neighbors";
  bars($("neighbors"), answer.neighbors.map(({name, label, similarity}) => [label ? `${label}: ${name}` : name, similarity]),
    "This bundle has no bank of training images.");
  if ($("second").value) sideBySide(await predict(JSON.parse($("second").value), mode, signal));
  if (answer.neighbors.length) await among(signal);
  document.body.dataset.shown = answer.bundle;
}

function sideBySide(other) {
  const says = found => found.labels[0]?.name ?? found.neighbors[0]?.label ?? "no label";
  const [one, two] = [answer, other].map(says);
  $("verdict").textContent = one === two ? `Both say ${one}` : `They differ: ${one} against ${two}`;
  [["side-one", answer], ["side-two", other]].forEach(([id, found]) => {
    const labels = element("div"), list = element("dl");
    const best = found.labels.length ? found.labels.map(({name, score}) => [name, score])
      : found.neighbors.map(({name, label, similarity}) => [label ?? name, similarity]);
    bars(labels, best, "neither labels nor neighbors");
    facts(list, about(found));
    $(id).replaceChildren(element("h3", `${found.bundle} ${found.version}`), labels, list);
  });
  $("compared").hidden = false;
}

function program(name, version, mode) {  // names of bundles have no quotes
  const auto = name === "auto", url = new URL("v1/predict", location.href);
  const wishes = Object.entries(auto ? {mode} : {bundle: name, version, mode}).filter(([, value]) => value);
  const header = ([wish, value]) => ` -H 'X-Cascade-${wish[0].toUpperCase()}${wish.slice(1)}: ${value}'`;
  const key = $("key").value;
  $("curl").textContent = `curl -T image.jpg${wishes.map(header).join("")}${key ? ' -H "Authorization: Bearer $KEY"' : ""} ${url}`;
  $("python").textContent = `import cascade\n\nwith cascade.Client("${url.origin}"${key ? ", key=key" : ""}) as client:\n` +
    `    print(client.predict("image.jpg", cascade.Options(${wishes.map(([wish, value]) => `${wish}="${value}"`).join(", ")})))`;
  $("code").hidden = false;
}

async function among(signal) {  // the map and the pictures of the neighbors
  const here = {name: answer.bundle, version: answer.version};
  [map] = await ask(`v1/map/${place(here)}`, {signal});
  const indices = answer.neighbors.map(({name}) => map.names.indexOf(name));
  if (!map.points.length) $("hover").textContent = "This bundle was made without a map: cascade map adds one.";
  else if (indices[0] >= 0) {
    const order = names(map, "labels"), near = new Set(answer.neighbors.map(({name}) => name));
    spots = drawPlane($("map"), map, {near, here: between(indices)});
    legend($("legend"), [...order.map((name, i) => [name, COLORS[i % COLORS.length]]), ["this image", HERE]]);
    $("map").setAttribute("aria-label", `map of ${map.points.length} training images; this image lies near ${answer.neighbors.map(n => n.label ?? n.name).join(", ")}`);
  }
  if (!map.thumbnails || indices.includes(-1)) return;
  const files = await Promise.all(indices.map(i => thumbnail(here, i, signal)));
  $("neighbors").className = "neighbors pictures";
  $("neighbors").replaceChildren(...answer.neighbors.map(({name, label, similarity}, i) => {
    const figure = element("figure", "", {title: name});
    figure.append(picture(files[i], name), element("span", label ?? name), element("span", similarity.toFixed(2)));
    return figure;
  }));
}

function between(indices) {  // an image that t-SNE has not seen: in the middle of its neighbors, nearer to the nearest
  const top = answer.neighbors[0].similarity;
  const weights = answer.neighbors.map(({similarity}) => Math.exp((similarity - top) / 0.05));
  const all = weights.reduce((sum, w) => sum + w, 0);
  return [0, 1].map(axis => indices.reduce((sum, i, k) => sum + weights[k] * (map.points[i]?.[axis] ?? 0.5), 0) / all);
}

async function attempt(what) {
  going.abort();  // what was asked before must not come over this
  const {signal} = going = new AbortController();
  for (const id of ["error", "facts", "labels", "neighbors", "legend", "hover", "side-one", "side-two"]) $(id).replaceChildren();
  clearPlane($("map"));
  spots = [];
  delete document.body.dataset.shown;
  for (const id of ["code", "compared", "dispatch"]) $(id).hidden = true;
  try { await what(signal); } catch (error) { if (!signal.aborted) $("error").textContent = error.message; }
}

function choose(files) {
  if (!files.length) return;
  const all = [...files].slice(0, MOST);
  $("batch").hidden = all.length < 2;
  $("batch").replaceChildren(...all.map(file => {
    const button = element("button", "", {ariaPressed: "false", onclick: () => take(file, button)});
    button.append(picture(file, file.name ?? "an image"));
    return button;
  }));
  take(all[0], $("batch").firstChild);
}

function take(file, button) {
  chosen = file;
  for (const other of $("batch").children) other.ariaPressed = String(other === button);
  $("drop").replaceChildren(picture(file, "the chosen image"));
  attempt(show);
}

$("drop").onclick = () => $("file").click();
$("drop").onkeydown = event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); $("file").click(); } };
$("drop").ondragover = event => { event.preventDefault(); $("drop").classList.add("over"); };
$("drop").ondragleave = () => $("drop").classList.remove("over");
$("drop").ondrop = event => { event.preventDefault(); $("drop").classList.remove("over"); choose(event.dataTransfer.files); };
document.onpaste = event => { if (event.clipboardData.files.length) { view("try"); choose(event.clipboardData.files); } };
$("file").onchange = () => {
  choose([...$("file").files]);
  $("file").value = "";  // so that the same file can be chosen again
};
$("bundle").onchange = $("mode").onchange = $("second").onchange = () => attempt(show);
$("key").onchange = () => attempt(async signal => { look(); reopen(); await bundles(signal); await show(signal); });
$("map").onmousemove = event => {
  const found = nearestSpot($("map"), spots, event);
  if (spots.length) $("hover").textContent = found < 0 ? "" : title(map, found);
};
for (const button of document.querySelectorAll("[data-copy]")) {
  button.hidden = !navigator.clipboard;  // pages over plain HTTP from another machine have none
  button.onclick = async () => {
    await navigator.clipboard.writeText($(button.dataset.copy).textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = `Copy ${button.dataset.copy === "curl" ? "curl" : "Python"}`; }, 1500);
  };
}
attempt(bundles);
