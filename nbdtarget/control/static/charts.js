// SPDX-License-Identifier: Apache-2.0
// The three charts of a device, over the last minutes. What was measured of each device is kept, so that one can look from device to device.

import uPlot from "./vendor/uplot.js";
import { bytes, milliseconds, rate } from "./model.js";

const KEPT = 300; // moments, one a second
const OPERATIONS = ["read", "write", "flush", "discard"];
const COLOURS = ["#0969da", "#bc4c00", "#1a7f37", "#8250df"];
const kept = new Map(); // by device: a list of [time, by operation: rate]

export function remember(now, before) {
  const seconds = now.time_s - before.time_s;
  const earlier = new Map(before.devices.map((device) => [device.name, device]));
  for (const name of kept.keys()) if (!now.devices.some((device) => device.name === name)) kept.delete(name);
  for (const device of now.devices) {
    const list = kept.get(device.name) ?? [];
    kept.set(device.name, list);
    list.push([now.time_s, OPERATIONS.map((operation) => rate(device, earlier.get(device.name), operation, seconds))]);
    if (list.length > KEPT) list.shift();
  }
}

// What the server has kept from before this page was opened: it goes in front of what the page has seen itself.
export function recall(name, moments) {
  const seen = kept.get(name) ?? [];
  const first = seen[0]?.[0] ?? Infinity;
  const older = moments.slice(1).map((now, nr) => {
    const before = moments[nr];
    return [now.time_s, OPERATIONS.map((operation) => rate(now, before, operation, now.time_s - before.time_s))];
  }).filter(([time]) => time < first);
  kept.set(name, [...older, ...seen].slice(-KEPT));
}

export function moments(name) {
  return (kept.get(name) ?? []).map(([time]) => time);
}

class Chart {
  constructor(id, value, format) {
    this.box = document.getElementById(id);
    this.words = document.getElementById(`${id}-words`);
    this.value = value;
    this.format = format;
    const ink = getComputedStyle(document.body).color;
    const axis = { stroke: ink, grid: { stroke: "#8884" }, ticks: { stroke: "#8884" } };
    this.plot = new uPlot({
      width: this.width(), height: 170, legend: { live: false }, cursor: { drag: { x: false, y: false } },
      scales: { y: { range: (_, low, high) => [0, high || 1] } },
      axes: [{ ...axis, space: 80, values: (_, ticks) => ticks.map((t) => new Date(t * 1000).toTimeString().slice(0, 8)) }, { ...axis, size: 75, values: (_, ticks) => ticks.map(format) }],
      series: [{}, ...OPERATIONS.map((label, nr) => ({ label, stroke: COLOURS[nr], dash: nr ? [8 - nr, nr + 1] : [], width: 2, spanGaps: false, points: { show: false }, value: (_, v) => v === null ? "-" : format(v) }))],
    }, [[], [], [], [], []], this.box);
    new ResizeObserver(() => this.plot.setSize({ width: this.width(), height: 170 })).observe(this.box);
  }

  width() { return Math.max(200, this.box.clientWidth); }

  draw(list) {
    const columns = OPERATIONS.map((_, nr) => list.map(([, rates]) => this.value(rates[nr])));
    this.plot.setData([list.map(([time]) => time), ...columns]);
    const last = columns.map((column) => column.at(-1) ?? null);
    this.words.textContent = OPERATIONS.map((name, nr) => last[nr] ? `${name} ${this.format(last[nr])}` : "").filter(Boolean).join(", ") || "nothing now";
  }
}

let charts = null;

export function drawCharts(name) {
  charts ??= [
    new Chart("rate", (r) => r.perS, (v) => v >= 1000 ? `${(v / 1000).toFixed(1)}k` : v < 10 ? v.toFixed(1) : v.toFixed(0)),
    new Chart("bytes", (r) => r.bytesPerS, (v) => bytes(v)),
    new Chart("time", (r) => r.meanS, (v) => milliseconds(v)),
  ];
  for (const chart of charts) chart.draw(kept.get(name) ?? []);
}
