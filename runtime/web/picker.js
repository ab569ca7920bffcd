/** Labels to choose: chips for a few, for a thousand a combobox (ARIA 1.2). The chosen are fields `label`. */
import { chip, element } from "./dom.js";

const FEW = 20; // labels that are shown all at once
const LISTED = 60; // matches that are listed

/** Fills a box for the labels of a model. chosen: class numbers. changed: called when others are chosen. */
export function pickLabels(box, { labels, aliases }, chosen, changed) {
  if (labels.length <= FEW) {
    const chips = labels.map((name, value) =>
      chip(name, { type: "checkbox", name: "label", value, checked: chosen.includes(value) }));
    box.replaceChildren(element("div", { className: "chips" }, ...chips));
    return;
  }
  box.replaceChildren(document.getElementById("picker").content.cloneNode(true));
  const [input, list, tags] = ["input", "[role=listbox]", ".tags"].map((name) => box.querySelector(name));
  const picked = new Set(chosen);
  let [shown, matches, active] = [false, [], 0];
  input.placeholder = `Search ${labels.length.toLocaleString("en")} labels`;

  function open(wanted = true) {
    shown = wanted;
    matches = shown ? search(labels, aliases, input.value).slice(0, LISTED) : [];
    active = 0;
    render();
  }

  function pick(number) {
    if (!picked.delete(number)) picked.add(number);
    input.focus();
    input.select();
    render();
    showTags();
    changed();
  }

  function move(by) {
    if (matches.length) active = (active + by + matches.length) % matches.length;
    else open();
  }

  function render() {
    list.hidden = !shown;
    input.ariaExpanded = String(shown);
    input.setAttribute("aria-activedescendant", matches.length ? `match-${active}` : "");
    list.replaceChildren(...matches.map(({ number, alias }, i) => element("li", {
      id: `match-${i}`, role: "option", className: i === active ? "active" : "",
      ariaSelected: String(picked.has(number)), onclick: () => pick(number),
    }, element("span", {}, labels[number], element("small", {}, alias ? ` ${alias}` : "")),
    element("small", {}, number))));
    if (!matches.length) list.append(element("li", { role: "option", ariaDisabled: "true" }, "No such label"));
    list.children[active]?.scrollIntoView({ block: "nearest" });
  }

  function showTags() {
    tags.replaceChildren(...[...picked].map((number) => element("li", {},
      element("input", { type: "hidden", name: "label", value: number }),
      element("button", {
        type: "button", className: "tag", ariaLabel: `Remove ${labels[number]}`, onclick: () => pick(number),
      }, `${labels[number]} \u00d7`))));
  }

  input.onkeydown = (event) => {
    if (event.key === "Backspace" && !input.value && picked.size) pick([...picked].at(-1));
    if (!["ArrowDown", "ArrowUp", "Enter", "Escape"].includes(event.key)) return;
    event.preventDefault();
    if (event.key === "Escape") open(false);
    else if (event.key === "Enter" && matches.length) pick(matches[active].number);
    else move(event.key === "ArrowUp" ? -1 : 1);
    render();
  };
  input.oninput = input.onclick = () => open();
  input.onblur = () => open(false);
  list.onmousedown = (event) => event.preventDefault(); // or the input loses the focus, and the list closes
  showTags();
}

/** What a query means, best first: [{ number, alias }] with the alias that matched better than the name. */
function search(labels, aliases, query) {
  const wanted = query.trim().toLowerCase();
  const rank = (name) => { // 1: it starts so, 2: a word does, 3: it contains it
    const place = ` ${name}`.toLowerCase().indexOf(` ${wanted}`);
    return place === 0 ? 1 : place > 0 ? 2 : name.toLowerCase().includes(wanted) ? 3 : Infinity;
  };
  return labels.map((name, number) => {
    const alias = (aliases[number] ?? []).find((other) => rank(other) < rank(name));
    const best = wanted === String(number) ? 0 : Math.min(rank(name), alias ? rank(alias) + 0.5 : Infinity);
    return { number, alias, best };
  }).filter(({ best }) => best < Infinity).sort((one, other) => one.best - other.best);
}
