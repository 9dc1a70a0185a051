// The page at /: asks /status once a second, and chats through the same API as every other client.
// Text of the model and of the server only ever becomes text nodes.
"use strict";

const byId = (id) => document.getElementById(id);
const number = (value, digits = 0) => value.toLocaleString("en", { maximumFractionDigits: digits });
const history = [];
const rates = [];
let before = null;
let model = "";
let running = null;

function fill(list, rows) {
  const parts = [];
  for (const [name, value, mono] of rows) {
    if (value === null || value === undefined || value === "") continue;
    const term = document.createElement("dt");
    term.textContent = name;
    const text = document.createElement("dd");
    text.textContent = value;
    if (mono) text.className = "mono";
    parts.push(term, text);
  }
  list.replaceChildren(...parts);
}

function setText(id, text) {
  const node = byId(id);
  if (node.textContent !== text) node.textContent = text;
}

function showLoad(load, now) {
  const tokens = load.output_tokens;
  if (before && tokens >= before.tokens) rates.push((tokens - before.tokens) / ((now - before.time) / 1000));
  before = { tokens, time: now };
  while (rates.length > 120) rates.shift();
  setText("rate", number(rates.at(-1) || 0, 1));
  setText("running", number(load.running || 0));
  setText("queued", `requests, ${number(load.queued || 0)} waiting`);
  const share = load.num_pages ? load.used_pages / load.num_pages : 0;
  setText("pages", `${number(100 * share)} %`);
  setText("pages-count", load.num_pages ? `${number(load.used_pages)} of ${number(load.num_pages)} key-value pages` : "of the key-value pages");
  byId("pages-meter").value = share;
  const looked = (load.cache_hit_tokens || 0) + (load.cache_miss_tokens || 0);
  setText("hits", looked ? `${number(100 * load.cache_hit_tokens / looked)} %` : "–");
  draw();
}

function draw() {
  const top = Math.max(1, ...rates);
  const points = rates.map((rate, place) => [120 - rates.length + place + 1, 61 - 58 * rate / top]);
  if (points.length < 2) return;
  const line = points.map(([x, y], place) => `${place ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
  byId("line").setAttribute("d", line);
  byId("area").setAttribute("d", `${line}L120 64L${points[0][0].toFixed(1)} 64Z`);
}

function showEngine(status) {
  const engine = status.engine;
  if (!engine) return;
  fill(byId("facts"), [
    ["Device", engine.device],
    ["Encoding", engine.encoding],
    ["Context", `${number(engine.max_length)} tokens`],
    ["Vocabulary", `${number(engine.vocab_size)} tokens`],
    ["Batch", `up to ${number(engine.max_batch_size)} requests`],
    ["Pages", `${number(engine.num_pages)}, each of ${number(engine.page_tokens)} tokens`],
    ["Version", status.version],
  ]);
  const [source, ...reason] = engine.artifact_source.split(": ");
  const seconds = engine.seconds || {};
  const phases = Object.entries(seconds).filter(([name, value]) => name !== "total" && value >= 0.005);
  fill(byId("start"), [
    ["Came from", source === "cache" ? "the cache, nothing was compiled" : source],
    ["Reason", reason.join(": ") === source ? "" : reason.join(": ")],
    ["Start", seconds.total === undefined ? null : `${number(seconds.total, 2)} s`],
    ["Of that", phases.map(([name, value]) => `${name} ${number(value, 2)} s`).join(", ")],
    ["Store", storeText(engine.cache || {})],
    ["Artifact", engine.artifact, true],
  ]);
}

function storeText(cache) {
  const counts = (name) => Object.entries(cache[name] || {}).map(([kind, count]) => `${number(count)} ${kind}`);
  const megabytes = (name, verb) => cache[name] ? [`${number(cache[name] / 1e6, 1)} MB ${verb}`] : [];
  const listed = (title, name) => counts(name).length ? [`${title} ${counts(name).join(", ")}`] : [];
  return [
    ...listed("found", "hits"),
    ...listed("missed", "misses"),
    ...listed("made", "made"),
    ...megabytes("bytes_read", "read"),
    ...megabytes("bytes_written", "written"),
    ...megabytes("bytes_fetched", "fetched"),
    ...(cache.quarantined ? [`${number(cache.quarantined)} set aside as damaged`] : []),
  ].join("; ");
}

async function refresh() {
  let state = "unreachable";
  let shown = "unreachable";
  try {
    const answer = await fetch("/status");
    const status = await answer.json();
    model = status.model;
    state = shown = status.state;
    if (status.progress) shown += `: ${status.progress}`;
    setText("model", model);
    document.title = `${model} – max`;
    showEngine(status);
    showLoad(status.load, performance.now());
    byId("send").disabled = running !== null || state !== "ready" || !status.has_chat;
  } catch {
    byId("send").disabled = true;
  }
  setText("state", shown);
  byId("state").className = `state ${state}`;
  setTimeout(refresh, 1000);
}

function bubble(kind, text) {
  const node = document.createElement("div");
  node.className = `message ${kind}`;
  node.textContent = text;
  byId("empty")?.remove();
  byId("messages").append(node);
  node.scrollIntoView({ block: "end" });
  return node;
}

async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function requestBody() {
  const system = byId("system").value.trim();
  const body = {
    model,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...history],
    stream: true,
    stream_options: { include_usage: true },
  };
  if (byId("temperature").value !== "") body.temperature = Number(byId("temperature").value);
  if (byId("limit").value !== "") body.max_completion_tokens = Number(byId("limit").value);
  return body;
}

async function ask(text) {
  history.push({ role: "user", content: text });
  bubble("user", text);
  const node = bubble("assistant", "");
  const started = performance.now();
  let content = "";
  let first = 0;
  running = new AbortController();
  byId("send").disabled = true;
  byId("stop").disabled = false;
  try {
    const answer = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(requestBody()),
      signal: running.signal,
    });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    for await (const event of eventsOf(answer)) {
      if (event.error) throw new Error(event.error.message);
      first ||= performance.now();
      content += event.choices[0]?.delta.content || "";
      node.textContent = content;
      if (event.usage) note(node, event.usage.completion_tokens, first - started, performance.now() - first);
      node.scrollIntoView({ block: "end" });
    }
    history.push({ role: "assistant", content });
  } catch (error) {
    if (error.name === "AbortError") history.push({ role: "assistant", content });
    else {
      history.pop();
      bubble("error", error.message);
    }
    if (!content) node.remove();
  } finally {
    running = null;
    byId("send").disabled = false;
    byId("stop").disabled = true;
    byId("prompt").focus();
  }
}

function note(node, tokens, wait, rest) {
  const line = document.createElement("small");
  const rate = tokens > 1 && rest > 0 ? `, ${number((tokens - 1) / (rest / 1000), 1)} tokens per second` : "";
  line.textContent = `${number(tokens)} tokens, the first after ${number(wait)} ms${rate}`;
  node.append(line);
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("prompt").value.trim();
  if (!text || running || byId("send").disabled) return;
  byId("prompt").value = "";
  ask(text);
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("form").requestSubmit();
  }
});
byId("stop").addEventListener("click", () => running?.abort());
byId("clear").addEventListener("click", () => {
  running?.abort();
  history.length = 0;
  byId("messages").replaceChildren();
});
refresh();
