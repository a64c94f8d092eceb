// SPDX-License-Identifier: Apache-2.0
// The page: asks for figures once a second, waits for events, and shows both. Everything that comes from the server is text, never markup.

import { drawCharts, recall, remember } from "./charts.js";
import { drawMap } from "./map.js";
import { bytes, clone, duration, milliseconds, rate, stacked, state, wrong } from "./model.js";
import { ask, mayChange, Refused, useToken } from "./server.js";

const PERIOD_MS = 1000;
const EVENTS_MAX = 300;
const $ = (id) => document.getElementById(id);
let before = null;
let now = null;
let selected = null;
const recalled = new Set(); // devices whose last minutes were asked for
let dirtyAtFirst = 0; // bytes, of the device that is being uncached

function cell(text, className = "") {
  const td = document.createElement("td");
  td.className = className;
  td.textContent = text;
  return td;
}

function rateWords({ perS, bytesPerS, meanS }) {
  return perS ? `${perS.toFixed(perS < 10 ? 1 : 0)}/s, ${bytes(bytesPerS)}/s, ${milliseconds(meanS)}` : "-";
}

function what(device, earlier, seconds) {
  const td = document.createElement("td");
  for (const target of device.targets) {
    const line = document.createElement("div");
    const bar = document.createElement("progress");
    if (target.type === "clone") {
      const { done, total, perS, leftS } = clone(target, earlier?.targets.find((each) => each.start === target.start), seconds);
      bar.max = total; bar.value = done;
      bar.setAttribute("aria-label", `${device.name}: copied`);
      line.append(bar, done === total ? " clone, complete" : ` clone, ${Math.floor(100 * done / total)} % of ${bytes(total)}${perS ? `, ${bytes(perS)}/s` : ""}${leftS === null ? "" : `, ${duration(leftS)} left`}`);
    } else if (target.type === "cache") {
      const f = target.fields;
      bar.max = f.cache_blocks_total; bar.value = f.cache_blocks_used;
      bar.setAttribute("aria-label", `${device.name}: cache in use`);
      line.append(bar, ` cache, ${bytes(f.cache_blocks_used * f.block_size_bytes)} used${f.hit_ratio === null ? "" : `, ${Math.round(100 * f.hit_ratio)} % hits`}, ${f.dirty_bytes ? `${bytes(f.dirty_bytes)} dirty` : "clean"}`);
    } else {
      line.textContent = target.type;
    }
    td.append(line);
    if (device.targets.length > 4) { line.textContent = `${device.targets.length} targets`; break; }
  }
  return td;
}

function drawDevices(seconds, earlier) {
  const focused = document.activeElement?.dataset?.device;
  const rows = stacked(now.devices).map(([device, depth]) => {
    const tr = document.createElement("tr");
    if (device.name === selected) tr.setAttribute("aria-current", "true");
    const name = document.createElement("td");
    const button = document.createElement("button");
    button.type = "button";
    button.className = "name";
    button.dataset.device = device.name;
    button.textContent = device.name;
    button.addEventListener("click", () => select(device.name));
    name.className = "device";
    name.append(depth ? `${"\u00a0\u00a0".repeat(depth)}on ` : "", button);
    const [word, kind] = state(device);
    const then = earlier.get(device.name);
    tr.append(name, cell(bytes(device.size), "number"), cell(word, kind), what(device, then, seconds),
      cell(rateWords(rate(device, then, "read", seconds)), "number"), cell(rateWords(rate(device, then, "write", seconds)), "number"), cell(device.connections, "number"));
    return tr;
  });
  $("devices").tBodies[0].replaceChildren(...rows);
  if (focused) document.querySelector(`button.name[data-device="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  $("no-devices").hidden = now.devices.length > 0;
  const lines = wrong(now.devices);
  if ($("wrong").dataset.lines !== lines.join("\n")) {
    $("wrong").dataset.lines = lines.join("\n");
    $("wrong").replaceChildren(...lines.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
  }
}

function drawClients(seconds) {
  const earlier = new Map((before?.clients ?? []).map((client) => [client.peer, client]));
  $("clients").tBodies[0].replaceChildren(...now.clients.map((client) => {
    const tr = document.createElement("tr");
    const then = earlier.get(client.peer);
    tr.append(cell(client.peer), cell(client.device || "(handshake)"), cell(client.identity),
      cell(rateWords(rate(client, then, "read", seconds)), "number"), cell(rateWords(rate(client, then, "write", seconds)), "number"), cell(client.in_flight, "number"));
    return tr;
  }));
  $("no-clients").hidden = now.clients.length > 0;
}

function drawDevice() {
  const device = now.devices.find((each) => each.name === selected);
  $("device").hidden = !device;
  if (!device) return;
  $("device-title").textContent = `Device ${device.name}`;
  $("stack").textContent = device.deps.length ? `stands on ${device.deps.join(", ")}` : "stands on nothing";
  $("verbs").hidden = !mayChange;
  $("suspend").disabled = device.suspended;
  $("resume").disabled = !device.suspended;
  drawUncaching(device);
  recallOnce(device.name);
  drawCharts(device.name);
}

function drawUncaching(device) {
  const cache = device.targets.find((target) => target.type === "cache");
  $("uncache").hidden = !cache || device.uncaching;
  $("uncaching").hidden = !device.uncaching;
  if (!device.uncaching) { dirtyAtFirst = 0; return; }
  const left = cache?.fields.dirty_bytes ?? 0;
  dirtyAtFirst = Math.max(dirtyAtFirst, left, 1);
  $("written-back").max = dirtyAtFirst;
  $("written-back").value = dirtyAtFirst - left;
  $("uncaching-words").textContent = `${bytes(left)} must still be written back`;
}

function recallOnce(name) {
  if (recalled.has(name)) return;
  recalled.add(name);
  ask("history", { name }).then(({ moments }) => {
    recall(name, moments);
    if (name === selected) drawCharts(name);
  }).catch((error) => {
    recalled.delete(name);
    if (!(error instanceof Refused)) complain(error); // refused: the device has just been removed
  });
}

async function look() {
  const figures = await ask("figures");
  before = now; now = figures;
  if (before) remember(now, before);
  if (!now.devices.some((device) => device.name === selected)) selected = now.devices[0]?.name ?? null;
  const seconds = before ? now.time_s - before.time_s : 0;
  const earlier = new Map((before?.devices ?? []).map((device) => [device.name, device]));
  const said = `version ${now.version}, process ${now.pid}, ${now.devices.length} devices, ${now.clients.length} clients${mayChange ? "" : "; read-only"}`;
  if ($("server").textContent !== said) $("server").textContent = said;
  $("main").hidden = false;
  $("login").hidden = true;
  drawDevices(seconds, earlier);
  drawClients(seconds);
  drawDevice();
}

async function lookAtMap() {
  const device = now?.devices.find((each) => each.name === selected);
  const hasMap = device && !device.suspended && device.targets.some((target) => target.type === "clone" || target.type === "cache");
  try {
    const map = hasMap ? await ask("map", { name: device.name }) : null;
    if (device?.name === selected) drawMap(map);
  } catch (error) {
    drawMap(null);
    if (!(error instanceof Refused)) throw error; // refused: the device has just been suspended, or its metadata is gone
  }
}

function select(name) {
  selected = name;
  $("answer").hidden = true;
  drawDevice();
  for (const row of $("devices").tBodies[0].rows) row.toggleAttribute("aria-current", false);
  const button = document.querySelector(`button.name[data-device="${CSS.escape(name)}"]`);
  button?.closest("tr").setAttribute("aria-current", "true");
  drawMap(null);
  lookAtMap().catch(complain);
}

function complain(error) {
  $("server").textContent = error instanceof Refused ? error.message : `The server does not answer: ${error.message}`;
  if (error.status === 401) {
    $("main").hidden = true;
    $("login").hidden = false;
    $("token").focus();
  }
}

function every(period, call) {
  const run = async () => {
    if (!document.hidden) await call().catch(complain);
    setTimeout(run, period);
  };
  run();
}

async function follow() {
  let since = 0;
  for (;;) {
    try {
      const answer = await ask("events", { since, wait_s: 20 });
      since = answer.last;
      for (const event of answer.events) {
        const item = document.createElement("li");
        if (event.level !== "info") item.className = "bad";
        item.textContent = `${new Date(event.time_s * 1000).toLocaleTimeString()} ${event.device ? `${event.device}: ` : ""}${event.text}`;
        $("events").append(item);
      }
      while ($("events").childElementCount > EVENTS_MAX) $("events").firstChild.remove();
      if (answer.events.length) $("events").scrollTop = $("events").scrollHeight;
    } catch {
      // `look` says on the page that the server does not answer.
      await new Promise((resolve) => { setTimeout(resolve, 3000); });
    }
  }
}

let asked = 0;

async function carryOut(verb, request) {
  const answer = $("answer");
  answer.hidden = false;
  answer.textContent = "…";
  const nr = ++asked;
  let said;
  try {
    said = (await ask(verb, request)).text ?? "Done.";
  } catch (error) {
    said = error.message;
  }
  if (nr === asked || verb === "uncache") answer.textContent = said; // an answer that came late does not hide a newer one
  await look().catch(complain);
}

$("suspend").addEventListener("click", () => carryOut("suspend", { name: selected }));
$("uncache").addEventListener("click", () => {
  const name = selected;
  if (window.confirm(`Write back what only the cache of ${name} has, and remove the cache? Clients go on meanwhile.`)) carryOut("uncache", { name });
});
$("stop-uncaching").addEventListener("click", () => carryOut("uncache", { name: selected, stop: true }));
$("resume").addEventListener("click", () => carryOut("resume", { name: selected }));
$("message").addEventListener("submit", (event) => {
  event.preventDefault();
  const words = $("words").value.trim().split(/\s+/).filter(Boolean);
  carryOut("message", { name: selected, sector: Number($("sector").value), words: words.length ? words : ["help"] });
});
$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  useToken($("token").value.trim());
  look().catch(complain);
});

every(PERIOD_MS, look);
every(2 * PERIOD_MS, lookAtMap);
follow();
