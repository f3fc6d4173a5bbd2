"use strict";
// Names come from input files. They reach the page only as text nodes and properties, never as markup.
const byId = (id) => document.getElementById(id);
const { run, folder, sizes, verdicts, labels, refresh, categories } = JSON.parse(byId("data").textContent);

const PAGE = 240; // cards on a page
const CHUNK = 60; // cards added at a time
const KEPT = 100; // parts of the images' facts that are held
const BINS = 25;
const ACRONYMS = new Set(["auroc", "ap", "f1", "pro", "aupro", "auc", "iou"]);

const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
const decimal = (value, digits = 3) => (value === null ? "\u2013" : value.toFixed(digits));

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function duration(seconds) {
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
  const whole = Math.round(seconds), hours = Math.floor(whole / 3600), minutes = Math.floor((whole % 3600) / 60);
  return hours ? `${hours} h ${minutes} min` : `${minutes} min ${whole % 60} s`;
}

function table(head, rows) {
  const cell = (tag, value) => (value instanceof Node ? value : element(tag, { textContent: value }));
  return element("table", {},
    element("thead", {}, element("tr", {}, ...head.map((value) => {
      const node = cell("th", value);
      node.scope = "col";
      return node;
    }))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((value) => cell("td", value))))));
}

const textCell = (value, className = "text") => element("td", { className, textContent: value });
const textHead = (value) => element("th", { className: "text", textContent: value });

function picture(uri, alt) {
  const none = () => element("span", { className: "picture", textContent: "No picture" });
  if (!uri) return none();
  const image = element("img", { className: "picture", src: uri, alt, decoding: "async", draggable: false });
  image.addEventListener("error", () => image.replaceWith(none()));
  return image;
}

// Data: parts of it are blocks of this page or, where there are many images, scripts beside it.

const pending = new Map(); // scripts on their way, by name
window.take = (name, text) => pending.get(name).resolve(JSON.parse(text));

function read(name) {
  const block = byId(name);
  if (block) return Promise.resolve(JSON.parse(block.textContent));
  if (pending.has(name)) return pending.get(name).promise;
  const part = {};
  part.promise = new Promise((resolve, reject) => Object.assign(part, { resolve, reject }));
  pending.set(name, part);
  const script = element("script", { src: `${folder}/${name}.js` });
  const end = () => {
    script.remove();
    pending.delete(name);
    // Too late where the script has brought what it should.
    part.reject(new Error(`${folder}/${name}.js is missing or damaged. It belongs beside this page: keep the two together, or write the report anew with --resume.`));
  };
  script.addEventListener("load", end);
  script.addEventListener("error", end);
  document.head.append(script);
  return part.promise;
}

const readAll = (name, size) => Promise.all(Array.from({ length: Math.ceil(total / size) }, (_, part) => read(`${name}-${part}`)));

// Of every image, by its position: the images are numbered as they came or, once the run is over, by falling score.
const total = categories.reduce((sum, category) => sum + category.images, 0);
const scores = new Float64Array(total);
const verdictOf = new Uint8Array(total); // from 1, 0 for none
const labelOf = new Uint32Array(total);
const categoryOf = new Uint32Array(total);
let paths = null; // read when they are first asked for

async function readNumbers() {
  (await readAll("numbers", sizes.numbers)).forEach((part, number) => {
    const start = number * sizes.numbers;
    scores.set(part.scores, start);
    verdictOf.set(part.verdicts, start);
    labelOf.set(part.labels, start);
    categoryOf.set(part.categories, start);
  });
}

const recent = new Map(); // parts of the images' facts, the one that was asked for last at the end

async function itemAt(position) {
  const number = Math.floor(position / sizes.images);
  const part = recent.get(number) ?? read(`images-${number}`);
  recent.delete(number);
  recent.set(number, part);
  if (recent.size > KEPT) recent.delete(recent.keys().next().value);
  const { name: label, anomalous } = labels[labelOf[position]];
  return {
    ...(await part)[position % sizes.images], score: scores[position], label, anomalous,
    verdict: verdicts[verdictOf[position] - 1] ?? null, category: categories[categoryOf[position]],
  };
}

// Header and the folded panels

function fillHeader() {
  const failed = categories.reduce((sum, category) => sum + category.failed, 0);
  const facts = [
    ["Images", String(run.images)],
    ["Categories", String(categories.length)],
    ["Preset", run.preset],
    ["Method", run.method],
    ["Device", run.device],
    ["Time", duration(run.seconds)],
    ["Throughput", `${decimal(run.images_per_second, 1)} images/s`],
    ["Peak memory", run.peak_memory_bytes === null ? "\u2013" : `${(run.peak_memory_bytes / 2 ** 30).toFixed(2)} GiB`],
    ["Started", run.started],
  ];
  byId("title").textContent = `zsad ${run.version}`;
  for (const [name, value] of facts) {
    byId("summary").append(element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value })));
  }
  if (failed) {
    byId("summary").append(element("div", { className: "warn" },
      element("dt", { textContent: "Not scored" }), element("dd", { textContent: plural(failed, "file") })));
  }
}

function metricName(key) {
  const words = key.split("_").map((word) => (ACRONYMS.has(word) ? word.toUpperCase() : word)).join(" ");
  return words[0].toUpperCase() + words.slice(1);
}

function fillCategories() {
  const metrics = [...new Set(categories.flatMap((category) => Object.keys(category.metrics ?? {})))];
  const measured = (key) => categories.map((category) => category.metrics?.[key] ?? null);
  const counts = categories.map(() => verdicts.map(() => 0));
  verdictOf.forEach((verdict, position) => { if (verdict) counts[categoryOf[position]][verdict - 1] += 1; });
  const columns = [ // title, value for a category, whether the report has it at all
    ["Images", (c) => String(c.images), true],
    ["Not scored", (c) => String(c.failed), categories.some((c) => c.failed)],
    ...verdicts.map((verdict, number) => [`${verdict[0].toUpperCase()}${verdict.slice(1)}`,
      (c, index) => (c.bounds ? String(counts[index][number]) : "\u2013"), hasVerdicts]),
    ["Accept up to", (c) => decimal(c.bounds?.accept ?? null), hasVerdicts],
    ["Reject above", (c) => decimal(c.bounds?.reject ?? null), hasVerdicts],
    ["Verdicts by", (c) => c.bounds?.rule ?? "\u2013", hasVerdicts],
    ["Groups", (c) => (c.group_size === null ? String(c.groups) : `${c.groups} of ${c.group_size}`), categories.some((c) => c.groups)],
    ["Image size", (c) => [...new Set(Object.values(c.image_sizes))].join(", ") || "\u2013", true],
    ["Time", (c) => duration(c.seconds), true],
    ["Protocol", (c) => c.protocol ?? "\u2013", categories.some((c) => c.protocol)],
  ].filter((column) => column[2]);
  const rows = categories.map((category, index) => {
    const name = element("button", { className: "link", type: "button", textContent: category.name });
    name.addEventListener("click", () => { controls.category.value = String(index); update(); });
    return [element("td", {}, name), ...metrics.map((key) => decimal(category.metrics?.[key] ?? null)),
      ...columns.map(([, value]) => value(category, index))];
  });
  const grid = table([textHead("Category"), ...metrics.map(metricName), ...columns.map(([title]) => title)], rows);
  if (metrics.length && categories.length > 1) {
    const means = metrics.map((key) => {
      const known = measured(key).filter((value) => value !== null);
      return decimal(known.length ? known.reduce((a, b) => a + b, 0) / known.length : null);
    });
    grid.tBodies[0].append(element("tr", { className: "mean" }, textCell("Mean"),
      ...[...means, ...columns.map(() => "")].map((value) => element("td", { textContent: value }))));
  }
  const panel = byId("categories");
  panel.hidden = false;
  panel.open = categories.length <= 6;
  panel.querySelector("summary").append(metrics.length ? "Categories and metrics" : "Categories",
    element("span", { className: "tally", textContent: String(categories.length) }));
  panel.querySelector(".body").append(grid);
}

function fillFailures() {
  const failures = categories.flatMap((category) => category.failures.map((failure) => ({ ...failure, category })));
  const failed = categories.reduce((sum, category) => sum + category.failed, 0);
  const panel = byId("failures");
  panel.hidden = !failed;
  panel.querySelector("summary").append("Files not scored", element("span", { className: "tally", textContent: String(failed) }));
  panel.querySelector(".body").append(table(["Category", "File", "Reason"].map(textHead),
    failures.map(({ category, path, reason }) => [textCell(category.name), textCell(path, "text wrap path"), textCell(reason, "text wrap")])));
  if (failures.length < failed) {
    panel.querySelector(".body").append(element("p", { className: "note", textContent: `${failed - failures.length} more are in run.json.` }));
  }
}

function fillRun() {
  const body = byId("run").querySelector(".body");
  const section = (title, ...nodes) => body.append(element("h2", { textContent: title }), ...nodes);
  const stages = Object.entries(run.stages);
  if (run.notes.length) section("Notes", ...run.notes.map((note) => element("p", { className: "note", textContent: note })));
  if (stages.length) {
    section("Stages", table([textHead("Stage"), "Seconds", "Share of the run"], stages.map(([name, seconds]) =>
      [name, seconds.toFixed(2), run.seconds > 0 ? `${(100 * seconds / run.seconds).toFixed(1)} %` : "\u2013"])));
  }
  if (run.checkpoints.length) {
    section("Checkpoints", table([textHead("Name"), textHead("SHA-256")], run.checkpoints.map(({ name, sha256 }) =>
      [name, textCell(sha256, "text path")])));
  }
  section("Configuration", element("pre", { textContent: JSON.stringify(run.config, null, 2) }));
}

// Filters

const controls = {
  category: byId("filter-category"), text: byId("filter-text"), low: byId("filter-low"), high: byId("filter-high"),
  verdict: byId("filter-verdict"), label: byId("filter-label"), sort: byId("sort"),
};
const hasTruth = labels.some((label) => label.anomalous !== null);
let hasVerdicts = false;

function fillFilters() {
  const option = (value, textContent) => element("option", { value, textContent });
  controls.category.append(option("", "All"), ...categories.map((category, index) => option(String(index), category.name)));
  byId("verdict-field").hidden = !hasVerdicts;
  const names = [...new Set(labels.map((label) => label.name).filter((name) => name !== null))].sort();
  controls.label.append(option("", "All"), ...(hasTruth ? [option("anomalous", "Any defect")] : []),
    ...names.map((name) => option(`label:${name}`, name)));
  byId("label-field").hidden = !hasTruth && !names.length;
}

// A range's end that is being typed or was emptied leaves that side open.
const bound = (control, open) => (Number.isFinite(control.valueAsNumber) ? control.valueAsNumber : open);

// The positions of all images in each order that was asked for.
const orders = {
  high: () => positions().sort((a, b) => scores[b] - scores[a] || a - b),
  low: () => inOrder("high").slice().reverse(),
  path: () => positions().sort((a, b) => (paths[a] < paths[b] ? -1 : paths[a] > paths[b] ? 1 : a - b)),
  recent: () => positions().reverse(),
};
const sorted = {};
const positions = () => Uint32Array.from(scores, (_, position) => position);
const inOrder = (name) => (sorted[name] ??= orders[name]());

// What the filters let through, in order; and what all but the range of scores do, counted for the histogram.
function selection() {
  const category = controls.category.value === "" ? null : Number(controls.category.value);
  const text = controls.text.value.trim().toLowerCase();
  const low = bound(controls.low, 0), high = bound(controls.high, 1);
  const truth = controls.label.value, verdict = controls.verdict.value;
  const accepted = [null, ...verdicts].map((own) => !verdict || (verdict === "not accept" ? own !== null && own !== "accept" : own === verdict));
  const labelled = labels.map(({ name, anomalous }) => !truth || (truth === "anomalous" ? anomalous === true : `label:${name}` === truth));
  const bad = labels.map(({ anomalous }) => anomalous === true);
  const bins = Array.from({ length: BINS }, () => ({ good: 0, bad: 0 }));
  const shown = new Uint32Array(total);
  let count = 0;
  for (const position of inOrder(controls.sort.value)) {
    const score = scores[position];
    if (category !== null && categoryOf[position] !== category) continue;
    if (!accepted[verdictOf[position]] || !labelled[labelOf[position]]) continue;
    if (text && !paths[position].toLowerCase().includes(text)) continue;
    bins[Math.max(0, Math.min(BINS - 1, Math.floor(score * BINS)))][bad[labelOf[position]] ? "bad" : "good"] += 1;
    if (score >= low && score <= high) shown[count++] = position;
  }
  return { category: categories[category] ?? null, low, high, bins, shown: shown.slice(0, count) };
}

function setRange(low, high) {
  controls.low.value = String(low);
  controls.high.value = String(high);
  update();
}

// Histogram of everything that passes the other filters; what the score range leaves out is dimmed.

function drawHistogram({ category, low, high, bins }) {
  const svg = byId("histogram");
  const [left, top, width, height] = [0, 14, 244, 98];
  const shape = (tag, attributes, text = "") => {
    const node = document.createElementNS(svg.namespaceURI, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.textContent = text;
    return node;
  };
  const most = Math.max(...bins.map((bin) => bin.good + bin.bad));
  const step = width / BINS;
  // Two defective images among thousands must still be seen.
  const tall = (count) => (count ? Math.max(2, (count / most) * height) : 0);
  svg.replaceChildren(shape("line", { class: "axis", x1: left, x2: left + width, y1: top + height + .5, y2: top + height + .5 }));
  bins.forEach((bin, index) => {
    const count = bin.good + bin.bad;
    if (!count) return;
    const from = index / BINS, to = (index + 1) / BINS, chosen = low === from && high === to;
    const bar = shape("g", {
      "data-testid": "bin", "data-count": count, role: "button", tabindex: 0, "aria-pressed": chosen,
      "aria-label": `Scores ${from.toFixed(2)} to ${to.toFixed(2)}: ${plural(count, "image")}`,
      class: to <= low || from >= high ? "outside" : "",
    });
    const x = left + index * step + .75, good = tall(bin.good), bad = tall(bin.bad);
    bar.append(
      shape("title", {}, `${from.toFixed(2)} to ${to.toFixed(2)}: ${plural(count, "image")}` + (hasTruth ? `, ${bin.bad} defective` : "")),
      shape("rect", { class: "hit", x: x - .75, y: top, width: step, height }),
      shape("rect", { class: "good", x, y: top + height - good, width: step - 1.5, height: good }),
      shape("rect", { class: "bad", x, y: top + height - good - bad, width: step - 1.5, height: bad }));
    const choose = () => (chosen ? setRange(0, 1) : setRange(from, to));
    bar.addEventListener("click", choose);
    bar.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(); }
    });
    svg.append(bar);
  });
  for (const [value, anchor] of [[0, "start"], [.5, "middle"], [1, "end"]]) {
    svg.append(shape("text", { x: left + value * width, y: top + height + 14, "text-anchor": anchor }, String(value)));
  }
  svg.append(shape("text", { x: left, y: 9 }, `tallest bar: ${plural(most, "image")}`));
  // Of several categories only if they share their bounds.
  const bounds = (category ? [category] : categories).map((each) => each.bounds);
  const same = bounds.every((each) => each && each.accept === bounds[0].accept && each.reject === bounds[0].reject);
  const lines = !same ? [] : bounds[0].accept === bounds[0].reject
    ? [["reject", bounds[0].reject, "accept up to, reject above"]]
    : [["accept", bounds[0].accept, "accept up to"], ["reject", bounds[0].reject, "reject above"]];
  for (const [name, value] of lines) {
    const x = left + value * width;
    svg.append(shape("line", { class: `bound ${name}`, "data-testid": "bound", x1: x, x2: x, y1: top - 2, y2: top + height }));
  }
  const entry = (mark, name) => element("li", {}, element("i", { className: mark }), name);
  byId("histogram-key").replaceChildren(
    ...(hasTruth ? [entry("good", "good"), entry("bad", "defective")] : []),
    ...lines.map(([name, value, words]) => entry(`bound ${name}`, `${words} ${decimal(value)}`)));
}

// Gallery: pages of cards, which are made when the reader comes near them.

let current = new Uint32Array(); // positions of what the filters let through, in order
let page = 0;
let made = 0; // how many of `current` have a card or lie on pages before

function chips(item) {
  const marks = [];
  if (item.note) {
    marks.push(element("span", { className: "chip defect", textContent: "damaged?", title: item.note }));
  }
  if (item.label !== null) {
    marks.push(element("span", { className: item.anomalous ? "chip defect" : "chip", textContent: item.label, title: `Ground truth: ${item.label}` }));
  }
  if (item.verdict !== null) {
    marks.push(element("span", { className: `chip ${item.verdict}`, textContent: item.verdict, title: `Verdict: ${item.verdict}` }));
  }
  return marks;
}

function card(item, index) {
  const fill = element("span");
  fill.style.width = `${100 * item.score}%`;
  const more = item.regions === null ? [] : [plural(item.regions.length, "region")];
  if (categories.length > 1) more.unshift(item.category.name);
  const node = element("button", { className: "card", type: "button" },
    element("span", { className: "pair" }, picture(item.image, `Image ${item.path}`), picture(item.overlay, `Anomaly map of ${item.path}`)),
    element("span", { className: "meter" }, fill),
    element("span", { className: "facts" },
      element("span", { className: "score", textContent: decimal(item.score) }),
      ...(item.rank ? [element("span", { className: "rank", textContent: `#${item.rank}`, title: `Rank ${item.rank} of ${item.category.images} in its category` })] : []),
      element("span", { className: "chips" }, ...chips(item))),
    element("span", { className: "path", textContent: item.path, title: item.path }),
    element("span", { className: "more", textContent: more.join(" \u00b7 ") }));
  Object.assign(node.dataset, { testid: "card", path: item.path, score: item.score, category: item.category.name });
  node.addEventListener("click", () => openView(index));
  return node;
}

// A place in the gallery, which gets its card once there is what it shows.
function place(index) {
  const node = element("li");
  node.filled = itemAt(current[index]).then((item) => node.append(card(item, index)));
  return node;
}

const pageEnd = () => Math.min((page + 1) * PAGE, current.length);

function addCards() {
  const end = Math.min(made + CHUNK, pageEnd());
  while (made < end) byId("gallery").append(place(made++));
}

const nearEnd = new IntersectionObserver((entries) => {
  if (!entries.some((entry) => entry.isIntersecting) || made >= pageEnd()) return;
  addCards();
  observeEnd();
}, { rootMargin: "1200px" });

function observeEnd() { // anew, so that it reports again if the end is still near
  nearEnd.unobserve(byId("sentinel"));
  nearEnd.observe(byId("sentinel"));
}

function showPage(number) {
  const last = Math.max(0, Math.ceil(current.length / PAGE) - 1);
  page = Math.max(0, Math.min(last, number));
  made = page * PAGE;
  byId("gallery").replaceChildren();
  addCards();
  observeEnd();
  byId("pager").hidden = last === 0;
  byId("page-number").value = String(page + 1);
  byId("page-number").max = String(last + 1);
  byId("page-last").textContent = `of ${last + 1}`;
  byId("page-previous").disabled = page === 0;
  byId("page-next").disabled = page === last;
}

function turnTo(number) {
  showPage(number);
  byId("top").scrollIntoView();
}

let asked = 0; // updates so far

async function update() {
  const own = ++asked;
  if (paths === null && (controls.text.value.trim() || controls.sort.value === "path")) {
    byId("count").textContent = "Reading names\u2026";
    paths = (await readAll("paths", sizes.numbers)).flat();
    if (own !== asked) return;
  }
  const chosen = selection();
  current = chosen.shown;
  showPage(0);
  byId("count").textContent = `${current.length} of ${plural(total, "image")}`;
  byId("reset").hidden = current.length === total;
  byId("empty").hidden = current.length > 0;
  drawHistogram(chosen);
}

byId("page-previous").addEventListener("click", () => turnTo(page - 1));
byId("page-next").addEventListener("click", () => turnTo(page + 1));
byId("page-number").addEventListener("change", (event) => turnTo((event.target.valueAsNumber || 1) - 1));

// Large view

const view = byId("view");
const stages = run.config.components ? "Foreground and tiles" : "Foreground";
let position = 0;

async function showItem(index) {
  position = index;
  const item = await itemAt(current[index]);
  if (position !== index) return; // the reader has gone on
  byId("view-path").textContent = item.path;
  byId("view-position").textContent = `${index + 1} of ${current.length}`;
  byId("view-previous").disabled = index === 0;
  byId("view-next").disabled = index === current.length - 1;
  const overlay = element("figcaption", { textContent: "Anomaly map" });
  if (item.overlay_file) {
    overlay.append(" \u00b7 ", element("a", { href: item.overlay_file, target: "_blank", rel: "noopener", textContent: "full size" }));
  }
  byId("view-pictures").replaceChildren(
    element("figure", {}, picture(item.image, `Image ${item.path}`), element("figcaption", { textContent: "Image" })),
    element("figure", {}, picture(item.overlay, `Anomaly map of ${item.path}`), overlay),
    ...(item.stages ? [element("figure", {}, picture(item.stages, `${stages} of ${item.path}`), element("figcaption", { textContent: stages }))] : []));
  const facts = [
    ["Score", decimal(item.score, 4)], ["Raw score", item.raw_score.toPrecision(6)],
    ["Rank", item.rank ? `${item.rank} of ${item.category.images}` : null], ["Category", item.category.name],
    ["Note", item.note], ["Ground truth", item.label], ["Verdict", item.verdict], ["p-value", item.p_value === null ? null : decimal(item.p_value, 4)],
    ["Accept up to", item.category.bounds && decimal(item.category.bounds.accept)],
    ["Reject above", item.category.bounds && decimal(item.category.bounds.reject)],
  ].filter(([, value]) => value !== null);
  byId("view-facts").replaceChildren(...facts.flatMap(([name, value]) =>
    [element("dt", { textContent: name }), element("dd", { textContent: value })]));
  byId("view-regions").parentElement.hidden = item.regions === null;
  byId("view-regions").replaceChildren(item.regions?.length
    ? table([textHead("x"), "y", "Width", "Height", "Area, px", "Peak"], item.regions.map((region) =>
      [region.x, region.y, region.width, region.height, region.area, decimal(region.peak)]))
    : element("p", { className: "note", textContent: "None" }));
}

async function openView(index) {
  await showItem(index);
  if (!view.open) view.showModal();
}

function stepView(by) {
  if (current[position + by] !== undefined) showItem(position + by);
}

byId("view-previous").addEventListener("click", () => stepView(-1));
byId("view-next").addEventListener("click", () => stepView(1));
byId("view-close").addEventListener("click", () => view.close());
view.addEventListener("click", (event) => { if (event.target === view) view.close(); });
view.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") stepView(-1);
  if (event.key === "ArrowRight") stepView(1);
});
view.addEventListener("close", async () => {
  if (Math.floor(position / PAGE) !== page) showPage(Math.floor(position / PAGE)); // the reader may have stepped on
  while (made <= position) addCards();
  const node = byId("gallery").children[position - page * PAGE];
  await node.filled;
  node.firstChild.focus();
});

byId("filters").addEventListener("input", update);
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("reset").addEventListener("click", () => {
  const order = controls.sort.value;
  byId("filters").reset();
  controls.sort.value = order;
  update();
});

if (refresh !== null) { // of images as they arrive
  const latest = byId("recent");
  latest.hidden = latest.disabled = false;
  latest.selected = true;
  setInterval(() => { if (!document.querySelector("dialog[open]")) location.reload(); }, 1000 * refresh);
}

window.addEventListener("unhandledrejection", (event) => {
  byId("unread").hidden = false;
  byId("unread").textContent = event.reason.message;
});

async function start() {
  fillHeader();
  fillFailures();
  fillRun();
  await readNumbers();
  hasVerdicts = verdictOf.some((verdict) => verdict > 0);
  fillFilters();
  fillCategories();
  await update();
  byId("unread").hidden = true;
}

start();
