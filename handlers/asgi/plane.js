"use strict";
// The map of a bundle's bank on a canvas: dots in colors of their labels or clusters, marked ones, and one more image.
const EDGE = 40, NEAR = 25, HERE = "#d23c2a";  // pixels of the canvas

function names(map, by) {  // the groups of a map, in the order of their colors
  const own = map[by] ?? [];
  return by === "clusters" ? [...new Set(own)].filter(k => k >= 0).sort((a, b) => a - b) : [...new Set(own)].sort();
}

const color = (map, by, i) => COLORS[Math.max(0, names(map, by).indexOf(map[by]?.[i])) % COLORS.length];
const groupName = (by, value) => by === "clusters" ? `cluster ${value}` : value;
const title = (map, i) => map.labels[i] ? `${map.labels[i]}: ${map.names[i]}` : map.names[i];

// Draws it, and gives the place of each dot. `near`: names of marked dots. `here`: the place of one more image, or null.
function drawPlane(canvas, map, {by = "labels", near = new Set(), here = null, only = null} = {}) {
  const pen = canvas.getContext("2d"), {width, height} = canvas, order = names(map, by);
  const at = ([x, y]) => [EDGE + (width - 2 * EDGE) * x, height - EDGE - (height - 2 * EDGE) * y];
  const dot = ([x, y], r) => { pen.beginPath(); pen.arc(x, y, r, 0, 7); };
  const ink = getComputedStyle(document.body).color;
  pen.clearRect(0, 0, width, height);
  const spots = map.points.map(at), shown = new Map(order.map((name, i) => [name, COLORS[i % COLORS.length]]));
  const small = map.points.length > 1500 ? 3.5 : 5;
  spots.forEach((spot, i) => {
    const marked = near.has(map.names[i]);
    pen.fillStyle = shown.get(map[by]?.[i]) ?? COLORS[0];
    pen.globalAlpha = marked ? 1 : near.size ? 0.4 : 0.7;
    dot(spot, marked ? 9 : i === only ? 12 : small); pen.fill();
    if (marked || i === only) { pen.lineWidth = 3; pen.strokeStyle = ink; pen.globalAlpha = 1; pen.stroke(); }
  });
  pen.globalAlpha = 1;
  if (here) {
    pen.fillStyle = HERE; pen.strokeStyle = "#fff"; pen.lineWidth = 4;
    dot(at(here), 15); pen.stroke(); pen.fill();
  }
  return spots;
}

function nearestSpot(canvas, spots, event) {  // the index of the dot under the pointer, or -1
  const scale = canvas.width / canvas.clientWidth, [x, y] = [event.offsetX * scale, event.offsetY * scale];
  let best = -1, least = NEAR;
  spots.forEach(([a, b], i) => { const gap = Math.hypot(a - x, b - y); if (gap < least) [best, least] = [i, gap]; });
  return best;
}

function clearPlane(canvas) {
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
  canvas.setAttribute("aria-label", "nothing yet");
}
