/** From what people call a class to its number, as runtime/labels.py. */
import { DDError } from "./errors.js";

/** Lower case, with single blanks. */
export const key = (text) => text.toLowerCase().trim().split(/\s+/).join(" ");

/** The class number of a number or a name. names: (N,) strings; aliases: by class number. */
export function labelIndex(names, aliases, label) {
  const text = String(label);
  if (/^\s*[+-]?\d+\s*$/.test(text)) {
    const number = Number(text);
    if (number >= 0 && number < names.length) return number;
    const hint = `There are classes 0 to ${names.length - 1}.`;
    throw new DDError("unknown_label", `Label ${number} is out of range.`, hint);
  }
  const wanted = key(text);
  const called = (name) => key(name) === wanted;
  const numbers = names.map((_, i) => i);
  const owners = numbers.filter((i) => called(names[i]) || (aliases[i] ?? []).some(called));
  if (owners.length === 1) return owners[0];
  const bare = (name) => name.replace(/ \([^(]*\)$/, "");
  const alike = owners.length ? owners : numbers.filter((i) => called(bare(names[i])));
  if (alike.length) {
    const choices = alike.map((i) => `${i} (${names[i]})`).join(", ");
    throw new DDError("unknown_label", `The label “${text}” is ambiguous: ${choices}.`, "Give the number.");
  }
  const near = numbers.find((i) => key(names[i]).includes(wanted) || wanted.includes(key(names[i])));
  throw new DDError("unknown_label", `No class is called “${text}”.`,
    near === undefined ? "Give one of the model's labels." : `Did you mean “${names[near]}” (class ${near})?`);
}
