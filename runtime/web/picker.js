// Choosing labels: chips for a few classes, a combobox (ARIA 1.2, with a listbox) for a thousand.
// What is chosen are form fields called "label", whose values are class numbers.

import { chip, element } from "./dom.js";

const FEW = 20; // classes that are shown all at once
const LISTED = 80; // options that a search shows

/** Fills a box with the labels of a model. chosen: their numbers. changed: called when the choice changes. */
export function pickLabels(box, model, chosen, changed) {
  if (model.labels.length <= FEW) {
    const chips = model.labels.map((name, number) => chip("checkbox", "label", number, name, chosen.includes(number)));
    return box.replaceChildren(element("div", { className: "chips" }, ...chips));
  }
  const input = element("input", {
    id: "search", type: "text", role: "combobox", spellcheck: false, "aria-label": "Search the labels",
    "aria-autocomplete": "list", "aria-controls": "found", "aria-expanded": "false",
    placeholder: `Search ${model.labels.length.toLocaleString("en")} labels`,
  });
  const list = element("ul", { id: "found", role: "listbox", "aria-label": "Labels", "aria-multiselectable": "true" });
  const tags = element("ul", { className: "chips chosen", "aria-label": "Chosen labels" });
  const picked = new Set(chosen);
  let active = -1;
  list.hidden = true;

  function showTags() {
    tags.replaceChildren(...[...picked].map((number) => element("li", {},
      element("button", {
        type: "button", className: "tag", "aria-label": `Remove ${model.labels[number]}`, onclick: () => pick(number),
      }, model.labels[number], element("span", { "aria-hidden": "true" }, "\u00d7")),
      element("input", { type: "hidden", name: "label", value: number }))));
  }

  function pick(number) {
    if (!picked.delete(number)) picked.add(number);
    showTags();
    for (const option of list.children) {
      if (option.dataset.number) option.ariaSelected = String(picked.has(Number(option.dataset.number)));
    }
    input.focus();
    changed();
  }

  function open(shown) {
    list.hidden = !shown;
    input.setAttribute("aria-expanded", String(shown));
    if (!shown) move(-1);
  }

  function move(index) {
    list.children[active]?.classList.remove("active");
    active = index;
    const option = list.children[active];
    option?.classList.add("active");
    option?.scrollIntoView({ block: "nearest" });
    input.setAttribute("aria-activedescendant", option?.id ?? "");
  }

  function find() {
    const matches = search(model, input.value);
    move(-1);
    list.replaceChildren(...matches.slice(0, LISTED).map(({ number, alias }) => element("li", {
      id: `label-${number}`, role: "option", "aria-selected": String(picked.has(number)), "data-number": number,
      onclick: () => pick(number),
    }, element("span", {}, model.labels[number], alias ? element("small", {}, ` ${alias}`) : ""),
    element("small", {}, String(number)))));
    const more = matches.length - LISTED;
    const remark = matches.length ? more > 0 && `${more} more: type to narrow` : "No label has this name or number";
    if (remark) list.append(element("li", { className: "more", role: "presentation" }, remark));
    list.scrollTop = 0;
    open(true);
  }

  input.oninput = find;
  input.onclick = find;
  input.onblur = () => open(false);
  list.onmousedown = (event) => event.preventDefault(); // or the input would lose the focus before the click
  input.onkeydown = (event) => {
    const options = list.querySelectorAll("[role=option]").length;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      if (list.hidden) find();
      else if (options) move((active + (event.key === "ArrowDown" ? 1 : active < 0 ? 0 : -1) + options) % options);
    } else if (event.key === "Enter" && !list.hidden && options) {
      pick(Number(list.children[Math.max(active, 0)].dataset.number));
    } else if (event.key === "Escape" && !list.hidden) open(false);
    else if (event.key === "Backspace" && !input.value && picked.size) pick([...picked].at(-1));
    else return;
    event.preventDefault();
  };
  showTags();
  box.replaceChildren(element("div", { className: "combobox" }, input, list), tags);
}

/** The labels that a query means, best first: [{ number, alias }]; alias: the one that matched, if any. */
function search(model, query) {
  const wanted = query.trim().toLowerCase().replace(/\s+/g, " ");
  const matches = [];
  model.labels.forEach((name, number) => {
    const rank = rankOf(name, wanted);
    const alias = rank ? undefined : (model.aliases[number] ?? []).find((other) => rankOf(other, wanted));
    if (wanted === String(number)) matches.push({ number, rank: 0 });
    else if (rank || alias) matches.push({ number, alias, rank: rank || 3 + rankOf(alias, wanted) });
  });
  return matches.sort((one, other) => one.rank - other.rank || one.number - other.number);
}

/** 1: starts with the query, 2: a word does, 3: contains it, 0: does not. */
function rankOf(name, wanted) {
  const text = name.toLowerCase();
  return text.startsWith(wanted) ? 1 : text.includes(` ${wanted}`) ? 2 : text.includes(wanted) ? 3 : 0;
}
