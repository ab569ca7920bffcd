/** What to draw, in fields `label`: labels as chips, or by a field that suggests if many; or sentences. */
import { chip, element } from "./dom.js";
import { labelIndex } from "./labels.js";

const FEW = 20; // labels that are shown all at once

/** Fills a box for sentences, one a line. text: those at first. */
export function writeSentences(box, text) {
  const ariaLabel = "Sentences, one a line";
  const field = { name: "label", rows: 3, ariaLabel, placeholder: ariaLabel, value: text };
  box.replaceChildren(element("textarea", field));
}

/** Fills a box for the labels of a model. chosen: class numbers. changed: called when others are chosen. */
export function pickLabels(box, { labels, aliases }, chosen, changed) {
  if (labels.length <= FEW) {
    const chips = labels.map((name, value) =>
      chip(name, { type: "checkbox", name: "label", value, checked: chosen.includes(value) }));
    box.replaceChildren(element("div", { className: "chips" }, ...chips));
    return;
  }
  box.replaceChildren(document.getElementById("picker").content.cloneNode(true));
  const [input, suggestions, tags] = ["input", "datalist", "ul"].map((name) => box.querySelector(name));
  const picked = new Set();

  function toggle(number) {
    if (!picked.delete(number)) picked.add(number);
    tags.replaceChildren(...[...picked].map((one) => element("li", {},
      element("input", { type: "hidden", name: "label", value: one }),
      element("button", {
        type: "button", className: "tag", ariaLabel: `Remove ${labels[one]}`, onclick: () => toggle(one),
      }, `${labels[one]} \u00d7`))));
    changed();
  }

  function take() {
    if (!input.value) return;
    try {
      toggle(labelIndex(labels, aliases, input.value));
      input.value = "";
    } catch ({ message, hint }) {
      input.setCustomValidity(`${message} ${hint}`);
      input.reportValidity();
    }
  }

  input.placeholder = `Search ${labels.length.toLocaleString("en")} labels`;
  input.onchange = take;
  input.oninput = ({ inputType }) => {
    input.setCustomValidity("");
    if (inputType === "insertReplacementText") take(); // a suggestion is chosen
  };
  input.onkeydown = (event) => {
    if (event.key !== "Enter" || !input.value) return; // which would draw
    event.preventDefault();
    take();
  };
  suggestions.append(...labels.map((value, number) =>
    element("option", { value, label: [number, ...(aliases[number] ?? [])].join(", ") })));
  chosen.forEach(toggle);
}
