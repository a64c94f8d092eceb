// SPDX-License-Identifier: Apache-2.0
// What the server says, and what follows from it: rates between two moments, words for people. No element of the page is touched here.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

export function bytes(size) {
  let unit = 0;
  while (size >= 1024 && unit < UNITS.length - 1) { size /= 1024; unit += 1; }
  return `${unit ? size.toFixed(1) : Math.round(size)} ${UNITS[unit]}`;
}

export function duration(seconds) {
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor(s % 3600 / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor(s % 86400 / 3600)} h`;
}

export function milliseconds(seconds) {
  return seconds === null ? "-" : seconds < 0.01 ? `${(seconds * 1000).toFixed(2)} ms` : `${Math.round(seconds * 1000)} ms`;
}

// Requests a second, bytes a second and mean time of one operation; null where there was none.
export function rate(now, before, operation, seconds) {
  const zero = { nr: 0, nr_bytes: 0, time_s: 0 };
  const a = before?.operations[operation] ?? zero;
  const b = now.operations[operation] ?? zero;
  const nr = b.nr - a.nr;
  if (!(seconds > 0) || nr < 0) return { perS: 0, bytesPerS: 0, meanS: null };
  return { perS: nr / seconds, bytesPerS: (b.nr_bytes - a.nr_bytes) / seconds, meanS: nr ? (b.time_s - a.time_s) / nr : null };
}

function hydrated(target) {
  return Math.min(target.fields.regions_hydrated * target.fields.region_size_bytes, target.length * 512);
}

export function clone(target, before, seconds) {
  const total = target.length * 512;
  const done = hydrated(target);
  const perS = before && before.type === "clone" && seconds > 0 ? Math.max(0, done - hydrated(before)) / seconds : 0;
  return { done, total, perS, leftS: perS && done < total ? (total - done) / perS : null };
}

export function state(device) {
  if (device.failed) return ["failed", "bad"];
  if (device.suspended) return ["suspended", "bad"];
  if (device.below.some((disk) => disk.state !== "ok")) return ["disk away", "bad"];
  return ["active", "good"];
}

export function wrong(devices) {
  const lines = [];
  for (const device of devices) {
    if (device.failure) lines.push(`${device.name}: ${device.failure}`);
    for (const disk of device.below) if (disk.state !== "ok") lines.push(`${device.name}: ${disk.name} is ${disk.state}: ${disk.last_error}`);
    if (device.losses) lines.push(`${device.name}: writes that were not flushed may have been lost (${device.losses} times)`);
    for (const target of device.targets) {
      if (target.fields.mode && target.fields.mode !== "rw") lines.push(`${device.name}: nothing is recorded any more (mode ${target.fields.mode}): ${target.fields.last_error ?? "see the log of the server"}`);
      if (target.fields.needs_check) lines.push(`${device.name}: its metadata must be checked: nbdtarget metadata check`);
    }
  }
  return lines;
}

// Devices with those that they stand on below them: [device, depth], each device once for each place where it stands.
export function stacked(devices) {
  const byPath = new Map(devices.map((device) => [`/dev/mapper/${device.name}`, device]));
  const used = new Set(devices.flatMap((device) => device.deps));
  const rows = [];
  const add = (device, depth) => {
    rows.push([device, depth]);
    for (const path of device.deps) if (byPath.has(path)) add(byPath.get(path), depth + 1);
  };
  for (const [path, device] of byPath) if (!used.has(path)) add(device, 0);
  return rows;
}
