/** An error that a user can act on: what is wrong, what to do (`hint`), and a word for programs (`code`). */
export class DDError extends Error {
  constructor(code, message, hint = "") {
    super(message);
    this.name = "DDError";
    this.code = code;
    this.hint = hint;
  }
}

const MEMORY = /RangeError|out of memory|allocat|bad_alloc|out of bounds/i;

/** What an engine or a browser throws, as a DDError. what: the work that failed. */
export function explained(error, what) {
  if (error instanceof DDError || error?.name === "AbortError") return error;
  const said = String(error?.message ?? error).split("\n")[0].slice(0, 300);
  if (error instanceof RangeError || MEMORY.test(said)) {
    const hint = "Close other tabs, or take a lower precision or the small decoder.";
    return new DDError("no_memory", `The memory does not suffice to ${what}.`, hint);
  }
  const hint = "Reload the page, or use another browser.";
  return new DDError("engine_failed", `The browser could not ${what}: ${said}`, hint);
}
