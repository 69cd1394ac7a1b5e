"use strict";
// Improve: the images that fitted no bundle, to look at, and to download as a folder for a training.
const LISTED = 60;  // as many as the server tells

async function strangers() {
  for (const id of ["kept", "refused", "strangers"]) $(id).replaceChildren();
  $("take").hidden = $("train").hidden = true;
  delete $("improve").dataset.shown;
  try {
    const [found] = await ask("v1/unknown");
    $("kept").textContent = found.count ? `${found.count.toLocaleString("en")} are kept, ${bytes(found.bytes)} of at most ${bytes(found.most.bytes)}` +
      `${found.count > LISTED ? `; these are the newest ${LISTED}` : ""}.` : "None so far: every image sent without a bundle's name fit one.";
    $("take").hidden = !found.count;
    $("strangers").replaceChildren(...await Promise.all(found.newest.slice(0, LISTED).map(async ({name, time}) => {
      const when = new Date(1000 * time).toLocaleString(), figure = element("figure", "", {title: name});
      const file = await call(`v1/unknown/${encodeURIComponent(name)}`).then(response => response.blob(), () => null);
      figure.append(file ? picture(file, `kept ${when}`) : element("em", "gone"), element("figcaption", when));
      return figure;
    })));
    $("improve").dataset.shown = found.count;
  } catch (error) {
    const why = {management_off: "Only an admin may see them, and no key of this server has role=admin.",
      keeping_off: "This server keeps none. Start it with --keep-unknown FOLDER."}[error.kind];
    $(why ? "kept" : "refused").textContent = why ?? error.message;
  }
}

async function download() {  // with the key, which a link could not send
  $("refused").textContent = "";
  try {
    const file = await (await call("v1/unknown.tar")).blob();
    const link = element("a", "", {href: URL.createObjectURL(file), download: "unknown.tar"});
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    $("train").textContent = "tar -xf unknown.tar\ncascade train --from-unknown unknown --out model_store/new/1";
    $("train").hidden = false;
  } catch (error) { $("refused").textContent = error.message; }
}

views.improve = strangers;
$("download").onclick = download;
