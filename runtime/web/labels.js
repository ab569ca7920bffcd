/** From what people call a class to its number, as runtime/labels.py. */
import { DDError } from "./errors.js";

/** Lower case, with single blanks. */
const key = (text) => text.toLowerCase().trim().split(/\s+/).join(" ");

/** The class number of a number or a name. names: (N,) strings; aliases: by class number. */
export function labelIndex(names, aliases, label) {
  const refuse = (message, hint) => { throw new DDError("unknown_label", message, hint); };
  const wanted = key(String(label));
  if (/^[+-]?\d+$/.test(wanted)) {
    const number = Number(wanted);
    if (number >= 0 && number < names.length) return number;
    refuse(`Label ${number} is out of range.`, `There are classes 0 to ${names.length - 1}.`);
  }
  const called = (name) => key(name) === wanted;
  const numbers = [...names.keys()];
  const owners = numbers.filter((i) => called(names[i]) || (aliases[i] ?? []).some(called));
  if (owners.length === 1) return owners[0];
  const bare = (name) => name.replace(/ \([^(]*\)$/, "");
  const alike = owners.length ? owners : numbers.filter((i) => called(bare(names[i])));
  const choices = alike.map((i) => `${i} (${names[i]})`).join(", ");
  if (choices) refuse(`The label “${label}” is ambiguous: ${choices}.`, "Give the number.");
  const near = names.findIndex((name) => key(name).includes(wanted) || wanted.includes(key(name)));
  refuse(`No class is called “${label}”.`,
    near < 0 ? "Give one of the model's labels." : `Did you mean “${names[near]}” (class ${near})?`);
}
