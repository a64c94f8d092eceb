// SPDX-License-Identifier: Apache-2.0
// The map of a device: one cell for each part of the disk, mixed of the colours of what is in it. The words below say the same.

import { bytes } from "./model.js";

const COLOURS = { copied: [26, 127, 55], source: [208, 215, 222], copying: [9, 105, 218], origin: [208, 215, 222], cached: [84, 174, 255], dirty: [207, 34, 46] };
const WORDS = {
  copied: "copied: the clone's own disk is read", source: "still read from the source", copying: "being copied now",
  origin: "not cached", cached: "cached", dirty: "dirty: only the cache has it",
};
const ROW = 128; // cells

export function drawMap(answer) {
  const box = document.getElementById("map-box");
  box.hidden = !answer;
  if (!answer) return;
  const canvas = document.getElementById("map");
  const rows = Math.ceil(answer.cells.length / ROW);
  canvas.width = ROW;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const image = context.createImageData(ROW, rows);
  answer.cells.forEach((shares, cell) => {
    const sum = shares.reduce((a, b) => a + b, 0) || 1;
    for (let channel = 0; channel < 3; channel += 1) {
      let value = 0;
      shares.forEach((share, nr) => { value += COLOURS[answer.states[nr]][channel] * share / sum; });
      image.data[cell * 4 + channel] = value;
    }
    image.data[cell * 4 + 3] = 255;
  });
  context.putImageData(image, 0, 0);
  const all = answer.totals.reduce((a, b) => a + b, 0) || 1;
  const words = answer.states.map((name, nr) => `${(100 * answer.totals[nr] / all).toFixed(answer.totals[nr] && answer.totals[nr] < all / 100 ? 2 : 0)} % ${WORDS[name]}`);
  const text = `${words.join("; ")}. A cell is ${bytes(answer.cell_bytes)}${answer.is_sampled ? ", of which a part was looked at" : ""}.`;
  canvas.setAttribute("aria-label", `Map from the beginning of the disk to its end: ${text}`);
  document.getElementById("map-words").textContent = text;
  const legend = document.getElementById("legend");
  if (legend.dataset.states !== answer.states.join()) {
    legend.dataset.states = answer.states.join();
    legend.replaceChildren(...answer.states.map((name) => {
      const item = document.createElement("li");
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      svg.setAttribute("aria-hidden", "true");
      for (const [key, value] of Object.entries({ width: "100%", height: "100%", fill: `rgb(${COLOURS[name]})` })) rect.setAttribute(key, value);
      svg.append(rect);
      item.append(svg, name);
      return item;
    }));
  }
}
