/** Labels to choose from: chips for a few, for a thousand a combobox (ARIA 1.2). The chosen are fields `label`. */
import { chip, element } from "./dom.js";

const FEW = 20; // labels that are shown all at once
const LISTED = 60; // matches that are listed

/** Fills a box for the labels of a model. chosen: class numbers. changed: called when others are chosen. */
export function pickLabels(box, { labels, aliases }, chosen, changed) {
  if (labels.length <= FEW) {
    const input = (value) => ({ type: "checkbox", name: "label", value, checked: chosen.includes(value) });
    return box.replaceChildren(element("div", { className: "chips" }, ...labels.map((name, i) => chip(name, input(i)))));
  }
  const picked = new Set(chosen);
  let [matches, active] = [[], 0];
  const input = element("input", {
    role: "combobox", spellcheck: false, placeholder: `Search ${labels.length.toLocaleString("en")} labels`,
    "aria-label": "Search the labels", "aria-controls": "matches", "aria-autocomplete": "list",
  });
  const list = element("ul", {
    id: "matches", role: "listbox", ariaLabel: "Labels", ariaMultiSelectable: "true", hidden: true,
    onmousedown: (event) => event.preventDefault(), // or the input loses the focus, and the list closes
  });
  const tags = element("ul", { className: "chips tags", ariaLabel: "Chosen labels" });

  function find(shown = true) {
    matches = shown ? search(labels, aliases, input.value).slice(0, LISTED) : [];
    active = 0;
    render();
  }

  function pick(number) {
    if (!picked.delete(number)) picked.add(number);
    input.focus();
    render();
    changed();
  }

  function render() {
    list.hidden = !matches.length;
    input.ariaExpanded = String(!list.hidden);
    list.replaceChildren(...matches.map(({ number, alias }, i) => element("li", {
      id: `match-${i}`, role: "option", ariaSelected: String(picked.has(number)), onclick: () => pick(number),
      className: i === active ? "active" : "",
    }, element("span", {}, labels[number], element("small", {}, alias ? ` ${alias}` : "")),
    element("small", {}, String(number)))));
    input.setAttribute("aria-activedescendant", matches.length ? `match-${active}` : "");
    list.children[active]?.scrollIntoView({ block: "nearest" });
    tags.replaceChildren(...[...picked].map((number) => element("li", {},
      element("input", { type: "hidden", name: "label", value: number }),
      element("button", {
        type: "button", className: "tag", ariaLabel: `Remove ${labels[number]}`, onclick: () => pick(number),
      }, labels[number], element("span", { ariaHidden: "true" }, "\u00d7")))));
  }

  const keys = {
    ArrowDown: () => (matches.length ? (active = (active + 1) % matches.length) : find()),
    ArrowUp: () => (matches.length ? (active = (active + matches.length - 1) % matches.length) : find()),
    Enter: () => (matches.length ? pick(matches[active].number) : find()),
    Escape: () => find(false),
  };
  input.onkeydown = (event) => {
    if (event.key === "Backspace" && !input.value && picked.size) pick([...picked].at(-1));
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
    render();
  };
  input.oninput = input.onclick = () => find();
  input.onblur = () => find(false);
  render();
  box.replaceChildren(element("div", { className: "combobox" }, input, list), tags);
}

/** What a query means, best first: [{ number, alias }] with the alias that matched if it was not the name. */
function search(labels, aliases, query) {
  const wanted = query.trim().toLowerCase();
  const rank = (name) => [` ${name}`.toLowerCase().indexOf(` ${wanted}`), name.toLowerCase().indexOf(wanted)]
    .reduce((best, place, i) => (place < 0 ? best : Math.min(best, place ? 2 * i + 2 : 1)), Infinity);
  return labels.map((name, number) => {
    if (wanted === String(number)) return { number, rank: 0 };
    const alias = (aliases[number] ?? []).find((other) => rank(other) < rank(name));
    return { number, alias, rank: alias ? rank(alias) + 1 : rank(name) };
  }).filter((match) => match.rank < Infinity).sort((one, other) => one.rank - other.rank);
}
