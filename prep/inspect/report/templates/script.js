
"use strict";
const filter = document.getElementById("filter");
const controls = { dataset: "by-dataset", kind: "by-kind", code: "by-code" };
const items = Array.from(document.querySelectorAll("[data-item]"), (node) => ({
  node, text: node.textContent.toLowerCase(),
}));
const element = (id) => document.getElementById(id);

function count(kind) {
  const all = items.filter((item) => item.node.dataset.item === kind);
  return `${all.filter((item) => !item.node.hidden).length} of ${all.length} ${kind}s`;
}

function apply() {
  const chosen = Object.entries(controls).map(([name, id]) => [name, element(id).value]).filter(([, value]) => value);
  const words = element("by-text").value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const { node, text } of items) {
    const isChosen = chosen.every(([name, value]) => node.dataset[name] === value);
    node.hidden = !(isChosen && words.every((word) => text.includes(word)));
  }
  const active = chosen.length > 0 || words.length > 0;
  for (const group of document.querySelectorAll("[data-group]")) {
    group.hidden = !group.querySelector("[data-item]:not([hidden])");
    if (group.tagName === "DETAILS") group.open = active && !group.hidden;
  }
  element("shown").textContent = active ? `${count("sample")}, ${count("reject")} shown` : "";
}

for (const id of [...Object.values(controls), "by-text"]) element(id).addEventListener("input", apply);
filter.hidden = false;
