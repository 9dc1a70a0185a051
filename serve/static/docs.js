// The page at /docs: /openapi.json as a list of routes with their fields.
"use strict";

function element(tag, text = "", className = "") {
  const node = document.createElement(tag);
  node.textContent = text;
  if (className) node.className = className;
  return node;
}

function named(document_, schema) {
  const name = schema?.$ref?.split("/").pop();
  return name ? document_.components.schemas[name] : schema;
}

function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop() === "Refused" ? "null (not supported)" : schema.$ref.split("/").pop();
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const members = schema.anyOf || schema.oneOf;
  if (members) return [...new Set(members.map(typeOf))].filter((type) => type !== "null" || members.length === 1).join(" | ");
  if (schema.type === "array") return `list of ${schema.items && Object.keys(schema.items).length ? typeOf(schema.items) : "anything"}`;
  const limits = [];
  if (schema.minimum !== undefined) limits.push(`from ${schema.minimum}`);
  if (schema.maximum !== undefined && schema.maximum < 2 ** 31 - 1) limits.push(`to ${schema.maximum}`);
  return [schema.type || "anything", ...limits].join(" ");
}

function fields(document_, title, schema) {
  const whole = named(document_, schema);
  if (!whole?.properties) return [];
  const table = element("table");
  const head = table.createTHead().insertRow();
  for (const name of ["field", "type", "meaning"]) head.append(element("th", name));
  const body = table.createTBody();
  const required = new Set(whole.required || []);
  for (const [name, field] of Object.entries(whole.properties)) {
    const row = body.insertRow();
    row.append(element("td", name + (required.has(name) ? " *" : ""), "mono"), element("td", typeOf(field)), element("td", field.description || ""));
  }
  return [element("h3", title), table];
}

function route(document_, path, method, operation) {
  const node = element("details");
  const summary = element("summary");
  summary.append(element("span", method.toUpperCase(), "method"), element("span", path, "mono"), element("span", operation.summary || "", "what"));
  const body = element("div", "", "body");
  const taken = operation.requestBody?.content["application/json"]?.schema;
  const given = operation.responses["200"]?.content?.["application/json"]?.schema;
  body.append(...fields(document_, "Body (* required)", taken), ...fields(document_, "Answer", given));
  if (!body.childNodes.length) body.append(element("p", operation.responses["200"]?.description || ""));
  node.append(summary, body);
  return node;
}

async function show() {
  const document_ = await (await fetch("/openapi.json")).json();
  for (const [path, operations] of Object.entries(document_.paths))
    for (const [method, operation] of Object.entries(operations))
      document.getElementById("routes").append(route(document_, path, method, operation));
}
show();
