(() => {
"use strict";
// Everything that a run brings along is put into the page as text (text nodes, attributes that hold text), never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const NOTHING = "–", CHUNK = 200, MOST_TASKS = 1000;
const FINISHED = "finished", REPEATED = "repeated", TEST = "test split", OTHERS = "other flags";
const byWords = new Intl.Collator("en", { numeric: true });
const isCost = new Set(data.costs);
const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== false && value !== null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

// ---- values as text

function written(value) {
  if (value === null || value === undefined || value === "") return NOTHING;
  if (Array.isArray(value)) return value.length ? value.map(written).join(" ") : "none";
  if (typeof value === "boolean") return value ? "1" : "0";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

function percent(fraction) {
  let value = 100 * fraction;
  if (Math.abs(value) % 0.5 === 0.125) value -= Math.sign(value) * 0.001; // ties go to the even digit, as in `report`
  const text = value.toFixed(2);
  return text === "-0.00" ? "0.00" : text;
}

function number(name, value) {
  if (typeof value !== "number") return NOTHING;
  if (!isCost.has(name)) return percent(value);
  return value.toLocaleString("en-US", { maximumFractionDigits: value >= 100 ? 0 : value >= 10 ? 1 : 2 });
}

const unit = (name) => (isCost.has(name) ? name : `${name} (%)`);
const breakable = (text) => text.split("_").flatMap((part, i) => (i ? ["_", make("wbr"), part] : [part]));

function describe(run) {
  const parts = data.columns.map((name, i) => [name, run.values[i]]).slice(0, data.num_named);
  return parts.filter(([, value]) => value !== null && value !== undefined)
    .map(([name, value]) => (["model", "dataset", "optimizer"].includes(name) ? written(value) : `${name} ${written(value)}`))
    .join(", ");
}

// ---- tables that sort, filter, and grow as they are read

class Table {
  // columns: {label, isNumber, kind, value(row), show(row) -> text or element}; keep(row): the filters
  constructor(title, columns, rows, keep, step = CHUNK) {
    Object.assign(this, { columns, rows, keep, step, limit: step, sorted: null, isUp: true });
    this.body = make("tbody");
    this.count = make("p", { class: "count" });
    this.more = make("p", { class: "more" });
    this.heads = columns.map((column) => this.head(column));
    const table = make("table", {}, make("caption", {}, title), make("thead", {}, make("tr", {}, ...this.heads)), this.body);
    this.box = make("div", { class: "box", role: "region", tabindex: "0", "aria-label": title }, table);
    this.element = make("div", {}, this.box, this.count, this.more);
    this.refresh();
  }

  head(column) {
    const classes = [column.isNumber ? "number" : "", column.kind || ""].join(" ").trim();
    if (!column.value) return make("th", { scope: "col", class: classes }, column.label);
    column.arrow = make("span", { class: "arrow", "aria-hidden": "true" });
    const button = make("button", { type: "button", click: () => this.sort(column) }, ...breakable(column.label), column.arrow);
    const printed = make("span", { class: "print" }, ...breakable(column.label)); // buttons are not repeated on each page
    return make("th", { scope: "col", class: classes }, button, printed);
  }

  sort(column) {
    this.isUp = this.sorted === column ? !this.isUp : true;
    this.sorted = column;
    this.columns.forEach((own, i) => {
      if (own === column) this.heads[i].setAttribute("aria-sort", this.isUp ? "ascending" : "descending");
      else this.heads[i].removeAttribute("aria-sort");
      if (own.arrow) own.arrow.textContent = own !== column ? "" : this.isUp ? "▲" : "▼";
    });
    this.refresh();
  }

  refresh() {
    this.shown = this.rows.filter(this.keep);
    if (this.sorted) {
      const keyed = this.shown.map((row) => [this.sorted.value(row), row]);
      const sign = this.isUp ? 1 : -1;
      keyed.sort(([a], [b]) => compare(a, b, sign));
      this.shown = keyed.map(([, row]) => row);
    }
    this.limit = this.step;
    this.body.replaceChildren();
    this.render();
  }

  render() { // adds the rows that are missing
    const fresh = document.createDocumentFragment();
    for (const row of this.shown.slice(this.body.childElementCount, this.limit)) fresh.append(this.line(row));
    this.body.append(fresh);
    const left = this.shown.length - this.body.childElementCount;
    const amount = (n) => n.toLocaleString("en-US");
    const filtered = this.shown.length < this.rows.length ? ` of ${amount(this.rows.length)}` : "";
    this.count.textContent = `${amount(this.shown.length)}${filtered} ${this.rows.length === 1 ? "row" : "rows"}` +
      (left ? `, the first ${amount(this.body.childElementCount)} shown` : "");
    const grow = (by) => () => { this.limit += by; this.render(); };
    this.more.replaceChildren(...(left ? [
      make("button", { type: "button", click: grow(this.step) }, `Show ${amount(Math.min(left, this.step))} more`),
    ] : []));
  }

  line(row) {
    const line = make("tr", { class: row.chosen ? "chosen" : null });
    for (const column of this.columns) {
      const cell = column.show(row);
      line.append(make("td", { class: [column.isNumber ? "number" : "", column.kind || ""].join(" ").trim() || null }, cell));
    }
    return line;
  }

  all() { this.limit = Infinity; this.render(); }
}

function compare(a, b, sign) { // what is missing comes last, in either direction
  const isMissing = (value) => value === null || value === undefined || value === "";
  if (isMissing(a) || isMissing(b)) return isMissing(a) - isMissing(b);
  if (typeof a === "number" && typeof b === "number") return sign * (a - b);
  return sign * byWords.compare(written(a), written(b));
}

const isNumeric = (values) => values.every((value) => value === null || typeof value === "number") &&
  values.some((value) => typeof value === "number");

// ---- filters: one set for all tables

const filters = { text: [], place: "", status: "", split: "", setting: "", values: new Map() };

function settingsOf(run) {
  const own = Object.keys(run.metrics);
  return own.length ? own : [run.setting];
}

function fits(run) { // whether a run passes the drop-downs
  for (const [i, wanted] of filters.values) if (written(run.values[i]) !== wanted) return false;
  return (!filters.place || String(run.place) === filters.place) && (!filters.status || run.status === filters.status) &&
    (!filters.split || run.split === filters.split) && (!filters.setting || settingsOf(run).includes(filters.setting));
}

const hasWords = (text) => filters.text.every((word) => text.includes(word));

function textOf(run) {
  run.text ??= [run.hash, run.folder, run.status, run.split, ...settingsOf(run), run.notes, run.commit, data.titles[run.place],
    ...run.values].map(written).join(" ").toLowerCase();
  return run.text;
}

function makeFilters(refresh) {
  const form = byId("filters");
  form.addEventListener("submit", (event) => event.preventDefault());
  let timer = 0;
  const search = make("input", { type: "search", id: "filter-text", autocomplete: "off", input: (event) => {
    filters.text = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    clearTimeout(timer);
    timer = setTimeout(refresh, data.runs.length > 500 ? 150 : 0);
  } });
  form.append(make("label", { class: "wide" }, "text in a row (all words)", search));
  const add = (name, label, values, change, show = written) => {
    if (values.length < (name === "place" || name === "status" || name === "split" ? 2 : 1)) return;
    const options = values.map((value) => make("option", { value: written(value) }, show(value)));
    const select = make("select", { id: `filter-${name}`, change: (event) => { change(event.target.value); refresh(); } },
      make("option", { value: "" }, "all"), ...options);
    form.append(make("label", {}, label, select));
  };
  const distinct = (values) => [...new Map(values.map((value) => [written(value), value])).values()].sort((a, b) => compare(a, b, 1));
  add("place", "record or folder", data.titles.map((title, i) => i), (value) => { filters.place = value; }, (i) => data.titles[i]);
  for (const name of ["dataset", "model", "optimizer", "buffer_size"]) {
    const i = data.columns.indexOf(name);
    if (i < 0) continue;
    const change = (value) => (value ? filters.values.set(i, value) : filters.values.delete(i));
    add(name, name.replace("_", " "), distinct(data.runs.map((run) => run.values[i])), change, (value) => (value === null ? "none" : written(value)));
  }
  add("setting", "setting", distinct(data.runs.flatMap(settingsOf).filter(Boolean)), (value) => { filters.setting = value; });
  add("status", "status", distinct(data.runs.map((run) => run.status)), (value) => { filters.status = value; });
  add("split", "measured on", distinct(data.runs.map((run) => run.split)), (value) => { filters.split = value; });
  form.append(make("button", { type: "reset" }, "Show all"));
  form.addEventListener("reset", () => {
    Object.assign(filters, { text: [], place: "", status: "", split: "", setting: "", values: new Map() });
    refresh();
  });
}

// ---- marks

const splitMark = (split) => (split === TEST ? split : make("span", { class: "badge mark" }, split));

function statusMark(status) {
  return status === FINISHED ? status : make("span", { class: `badge ${status === REPEATED ? "mark" : "bad"}` }, status);
}

// ---- tables of groups

const splits = new Set(data.runs.map((run) => run.split));
const showsSplit = splits.size > 1 || !splits.has(TEST);

function groupTable(title, part) {
  const columns = part.keys.map((key, i) => ({
    label: key, isNumber: isNumeric(part.rows.map((row) => row.values[i])),
    value: (row) => row.values[i], show: (row) => written(row.values[i]),
  }));
  if (showsSplit) columns.push({ label: "measured on", value: (row) => row.split, show: (row) => splitMark(row.split) });
  columns.push({ label: "n", isNumber: true, value: (row) => row.runs.length, show: (row) => String(row.runs.length) });
  data.metrics.forEach((name, i) => columns.push({
    label: unit(name), isNumber: true, value: (row) => row.cells[i][1], show: (row) => row.cells[i][0],
  }));
  if (part.rows.some((row) => row.notes)) columns.push({
    label: "note", kind: "long", value: (row) => row.notes,
    show: (row) => (row.notes ? make("span", { class: "warning" }, row.notes) : ""),
  });
  for (const row of part.rows) row.text = [...row.values.map(written), row.split, part.setting, title, row.notes].join(" ").toLowerCase();
  const keep = (row) => (!filters.setting || filters.setting === part.setting) && hasWords(row.text) &&
    row.runs.some((i) => fits(data.runs[i]));
  return new Table(`${part.setting}: mean ± sample standard deviation`, columns, part.rows, keep);
}

// ---- the table of runs

const chosen = [];

function choose(run, isChosen) {
  if (isChosen) chosen.push(run);
  else chosen.splice(chosen.indexOf(run), 1);
  if (chosen.length > 2) mark(chosen.shift(), false);
  mark(run, isChosen);
  showChosen();
}

function mark(run, isChosen) {
  run.chosen = isChosen;
  const box = byId(`choose-${run.number}`);
  if (!box) return; // its row is not in the table now
  box.checked = isChosen;
  box.closest("tr").classList.toggle("chosen", isChosen);
}

function showChosen() {
  const bar = byId("chosen");
  bar.hidden = chosen.length === 0;
  const clear = () => { for (const run of chosen.splice(0)) mark(run, false); showChosen(); };
  bar.replaceChildren(
    make("span", { role: "status" }, chosen.length === 2 ? "2 runs are chosen." : "1 run is chosen: choose another one to compare."),
    ...(chosen.length === 2 ? [make("button", { type: "button", id: "compare", click: showDifference }, "What differs?")] : []),
    make("button", { type: "button", click: clear }, "Choose none"),
  );
}

function shownSetting(run) {
  const wanted = filters.setting || data.setting;
  return wanted && settingsOf(run).includes(wanted) ? wanted : run.setting;
}

function metricOf(run, name) { // of a finished run: what an unfinished one has reached is in its details
  const own = run.metrics[shownSetting(run)];
  if (![FINISHED, REPEATED].includes(run.status)) return null;
  return (own && own[name]) ?? run.cost[name] ?? null;
}

function runTable() {
  const columns = [{
    label: "choose", kind: "choose",
    show: (run) => make("input", { type: "checkbox", id: `choose-${run.number}`, "aria-label": `choose ${describe(run)}`,
      checked: Boolean(run.chosen), change: (event) => choose(run, event.target.checked) }),
  }, {
    label: "run", value: (run) => run.folder,
    show: (run) => make("button", { type: "button", class: "link", "aria-label": `open ${describe(run)}, ${run.hash}`,
      click: () => showRun(run) }, run.hash.slice(0, 12)),
  }, { label: "status", value: (run) => run.status, show: (run) => statusMark(run.status) }];
  if (data.titles.length > 1) columns.push({
    label: "record or folder", kind: "long", value: (run) => data.titles[run.place], show: (run) => data.titles[run.place],
  });
  const keyColumn = (name, i) => ({
    label: name, kind: name === OTHERS ? "long wide" : "", isNumber: isNumeric(data.runs.map((run) => run.values[i] ?? null)),
    value: (run) => run.values[i] ?? null, show: (run) => written(run.values[i]),
  });
  const named = data.columns.map(keyColumn);
  columns.push(...named.slice(0, data.num_named));
  columns.push({ label: "setting", value: shownSetting, show: (run) => written(shownSetting(run)) });
  if (showsSplit) columns.push({ label: "measured on", value: (run) => run.split, show: (run) => splitMark(run.split) });
  for (const name of data.metrics) columns.push({
    label: unit(name), isNumber: true, value: (run) => metricOf(run, name), show: (run) => number(name, metricOf(run, name)),
  });
  columns.push(...named.slice(data.num_named));
  for (const name of data.cost_columns) columns.push({
    label: name, isNumber: true, value: (run) => run.cost[name] ?? null, show: (run) => number(name, run.cost[name]),
  });
  columns.push({
    label: "commit", value: (run) => run.commit,
    show: (run) => (run.commit ? run.commit.slice(0, 8) + (run.changed ? " + changes" : "") : NOTHING),
  });
  if (data.runs.some((run) => run.notes)) columns.push({
    label: "notes", kind: "long", value: (run) => run.notes, show: (run) => run.notes,
  });
  return new Table("Each run, with the metrics of its setting", columns, data.runs,
    (run) => fits(run) && hasWords(textOf(run)));
}

// ---- a run's details, and what two runs differ in

function flagsOf(run) { // name -> [value, origin]; those at their defaults last
  const flags = new Map();
  for (const [name, [value, origin]] of Object.entries(run.own)) flags.set(name, [value, data.origins[origin]]);
  const common = Object.entries(data.common).filter(() => run.has_flags);
  for (const [name, entry] of common) if (entry.origin !== "default") flags.set(name, [entry.value, entry.origin]);
  for (const [name, value] of Object.entries(data.defaults[run.defaults])) flags.set(name, [value, "default"]);
  for (const [name, entry] of common) if (entry.origin === "default") flags.set(name, [entry.value, "default"]);
  return flags;
}

function flat(content, prefix = "", found = new Map()) { // {"packages": {"torch": "2"}} -> "packages torch": "2"
  if (content === null || typeof content !== "object" || (Array.isArray(content) && content.every((item) => item === null || typeof item !== "object"))) {
    found.set(prefix || "value", content);
  } else {
    for (const [name, value] of Object.entries(content)) flat(value, prefix ? `${prefix} ${name}` : name, found);
  }
  return found;
}

function plainTable(title, heads, rows, numbersFrom = Infinity) {
  const cell = (tag, value, i) => make(tag, { class: i >= numbersFrom ? "number" : null, scope: tag === "th" ? "row" : null }, value);
  const lines = rows.map((row) => make("tr", {}, ...row.map((value, i) => cell(i === 0 ? "th" : "td", value, i))));
  const head = make("tr", {}, ...heads.map((text, i) => make("th", { scope: "col", class: i >= numbersFrom ? "number" : null }, ...breakable(text))));
  return make("div", { class: "box", role: "region", tabindex: "0", "aria-label": title },
    make("table", { "aria-label": title }, make("thead", {}, head), make("tbody", {}, ...lines)));
}

const part = (title, ...content) => make("section", {}, make("h3", {}, title), ...content);
const folded = (title, ...content) => make("details", {}, make("summary", {}, title), ...content);
const quiet = (text) => make("p", { class: "count" }, text);

function open(title, ...content) {
  const panel = byId("panel");
  const close = make("button", { type: "button", click: () => panel.close() }, "Close");
  panel.replaceChildren(make("div", { class: "head" }, make("h2", { id: "panel-title" }, title), close), ...content);
  panel.showModal();
  panel.scrollTop = 0;
}

function showRun(run) {
  const settings = Object.keys(run.metrics);
  const names = [...new Set(settings.flatMap((setting) => Object.keys(run.metrics[setting])))];
  const isDone = [FINISHED, REPEATED].includes(run.status);
  const flags = [...flagsOf(run)].map(([name, [value, origin]]) => [name, written(value), written(origin)]);
  const code = data.codes[run.code];
  const marks = [statusMark(run.status), ", ", splitMark(run.split)];
  if (run.status === REPEATED) marks.push(". A newer run has the same flags and seed. This one is not counted in the tables of groups.");
  open(describe(run), make("p", {}, ...marks), quiet(`${data.titles[run.place]}: ${run.folder}`),
    ...(run.notes ? [make("p", {}, `Notes: ${run.notes}`)] : []),
    part(isDone ? "Metrics in %" : "Metrics in %, over the tasks that are finished", names.length
      ? plainTable("Metrics", ["metric", ...settings], names.map((name) => [name, ...settings.map((setting) => number(name, run.metrics[setting][name]))]), 1)
      : quiet("There are none yet.")),
    part("Cost", plainTable("Cost", ["cost", "value"], Object.entries(run.cost).map(([name, value]) => [name, number(name, value)]), 1)),
    part("Flags", plainTable("Flags", ["flag", "value", "origin"], flags.filter(([, , origin]) => origin !== "default")),
      folded(`${flags.filter(([, , origin]) => origin === "default").length} flags at their defaults`,
        plainTable("Flags at their defaults", ["flag", "value"], flags.filter(([, , origin]) => origin === "default").map((row) => row.slice(0, 2))))),
    part("What the seed decided", ...seededOf(run)),
    part("Environment", run.environment === null ? quiet("It was not written down.")
      : plainTable("Environment", ["what", "value"], [...flat(data.environments[run.environment])].map(([name, value]) => [name, written(value)]))),
    part("Code", folded("Protocol, and the digests of the files that made the run",
      plainTable("Code", ["what", "value"], [...flat(code)].map(([name, value]) => [name, written(value)])))),
    part("End of the log", run.log === undefined ? quiet("There is none: only a sweep writes logs (logs/ beside the runs).")
      : run.log === null ? quiet("It is left out, since the page takes only the newest logs, up to a total size.")
        : make("pre", { tabindex: "0", "aria-label": "End of the log" }, run.log)));
}

function seededOf(run) {
  if (run.seeded === undefined) return [quiet("It is not in this record (benchmark.json of the run folder).")];
  if (run.seeded === null) return [quiet("It is left out, since the page takes only that of the newest runs, up to a total size.")];
  const content = data.seeded[run.seeded];
  const tasks = content && Array.isArray(content.tasks) && content.tasks.every((task) => task && typeof task === "object") ? content.tasks : null;
  const rest = content && typeof content === "object" && tasks ? Object.fromEntries(Object.entries(content).filter(([name]) => name !== "tasks")) : content;
  const found = [plainTable("What the seed decided", ["what", "value"], [...flat(rest)].map(([name, value]) => [name, written(value)]))];
  if (tasks) {
    const names = [...new Set(tasks.flatMap(Object.keys))];
    const rows = tasks.slice(0, MOST_TASKS).map((task, i) => [String(i + 1), ...names.map((name) => written(task[name]))]);
    found.push(plainTable("Tasks", ["task", ...names.map((name) => name.replaceAll("_", " "))], rows));
    if (tasks.length > MOST_TASKS) found.push(quiet(`The first ${MOST_TASKS} of ${tasks.length} tasks.`));
  }
  return found;
}

function showDifference() {
  const [a, b] = chosen;
  const heads = ["", `A: ${a.hash.slice(0, 12)}`, `B: ${b.hash.slice(0, 12)}`];
  const differing = (left, right, show = (name, value) => written(value)) => [...new Set([...left.keys(), ...right.keys()])]
    .filter((name) => JSON.stringify(left.get(name)) !== JSON.stringify(right.get(name)))
    .map((name) => [name, ...[left, right].map((own) => (own.has(name) ? show(name, own.get(name)) : "not there"))]);
  const metrics = (run) => new Map(Object.entries(run.metrics).flatMap(([setting, own]) => Object.entries(own).map(([name, value]) => [`${setting}: ${name}`, value])));
  const general = (run) => new Map([["status", run.status], ["measured on", run.split], ["record or folder", data.titles[run.place]], ["notes", run.notes]]);
  const environment = (run) => flat(data.environments[run.environment] ?? {});
  const seeded = (run) => flat(typeof run.seeded === "number" ? data.seeded[run.seeded] : {});
  const parts = [
    ["The runs", differing(general(a), general(b))],
    ["Flags", differing(flagsOf(a), flagsOf(b), (name, [value, origin]) => `${written(value)} (${written(origin)})`)],
    ["Code", differing(flat(data.codes[a.code]), flat(data.codes[b.code]))],
    ["Environment", differing(environment(a), environment(b))],
    ["What the seed decided", typeof a.seeded === "number" && typeof b.seeded === "number" ? differing(seeded(a), seeded(b)) : []],
    ["Metrics in %", differing(metrics(a), metrics(b), (name, value) => number("", value))],
    ["Cost", differing(new Map(Object.entries(a.cost)), new Map(Object.entries(b.cost)), number)],
  ];
  open("What differs", make("p", {}, `A: ${describe(a)}`), make("p", {}, `B: ${describe(b)}`),
    ...parts.map(([title, rows]) => part(title, rows.length ? plainTable(title, heads, rows, title.startsWith("Metrics") || title === "Cost" ? 1 : Infinity) : quiet("No difference."))));
}

// ---- the page

const named = ([names, values]) => Object.fromEntries(data.names[names].map((name, i) => [name, values[i]]));
data.runs.forEach((run, i) => {
  run.number = i;
  run.cost = named(run.cost);
  run.metrics = Object.fromEntries(Object.entries(run.metrics).map(([setting, own]) => [setting, named(own)]));
});
const places = data.sections.map((parts, i) => {
  const place = byId(`place-${i}`), tables = parts.map((own) => groupTable(data.titles[i], own));
  place.append(...tables.map((table) => table.element));
  if (!parts.length) place.append(quiet("No run is finished here: see the table of all runs."));
  return { place, tables };
});
const groups = places.flatMap(({ tables }) => tables);
const all = runTable();
all.count.setAttribute("role", "status"); // what a filter leaves is said once, not for each table
byId("runs").append(
  make("p", { class: "hint" }, "Open a run by its name to see its flags, environment and log. Choose two to see what differs."),
  all.element,
);

const counts = new Map();
for (const run of data.runs) counts.set(run.status, (counts.get(run.status) || 0) + 1);
byId("counts").textContent = `${data.runs.length.toLocaleString("en-US")} runs: ` +
  [...counts].map(([status, n]) => `${n.toLocaleString("en-US")} ${status}`).join(", ") +
  (showsSplit ? ". Runs on validation splits are marked, and never averaged with others." : ". All accuracies are of the test split.");

makeFilters(() => {
  for (const table of [...groups, all]) table.refresh();
  for (const table of groups) table.element.hidden = table.shown.length === 0;
  for (const { place, tables } of places) place.hidden = tables.length > 0 && tables.every((table) => table.element.hidden);
});
addEventListener("beforeprint", () => { for (const table of groups) table.all(); });
})();
