/** The one sampler of every family, as runtime/sampler.py: `known` positions stay, the rest is the noise. */
import { nearestCodes } from "./teacher.js";

/**
 * The steps of one image in order; the last one is the result.
 * student(latents, known) -> { sequence: float32 (L*Cv), tokens: int32 (S) }.
 * generate(span, prefix) -> int32 (end). noise: float32 (L*Cv). width: Cv.
 * codebook: float32 (V*Cv), for schedules with a teacher.
 */
export async function sample({ student, generate, codebook, noise, schedule, width }) {
  const steps = [];
  const span = schedule.teacher;

  async function take(role, known, step) {
    const began = performance.now();
    const made = await step(known, steps.at(-1));
    steps.push({ role, known, ...made, seconds: (performance.now() - began) / 1000 });
  }

  async function byStudent(known, before) {
    const latents = noise.slice();
    if (before) latents.set(before.sequence.subarray(0, known * width));
    const { sequence, tokens } = await student(latents, known);
    // What is kept was decided before: its token is the one reported then, as in the published code.
    if (before) tokens.set(before.tokens.subarray(0, Math.min(known, tokens.length)));
    return { tokens, sequence };
  }

  async function byTeacher(start, before) {
    const own = before?.tokens.subarray(0, start) ?? [];
    // Behind the student's split the nearest codebook entries.
    const rest = before?.sequence.subarray(own.length * width, start * width) ?? [];
    const tokens = await generate(span, [...own, ...nearestCodes(rest, codebook, width)]);
    const sequence = noise.slice();
    tokens.forEach((token, i) => {
      sequence.set(codebook.subarray(token * width, (token + 1) * width), i * width);
    });
    return { tokens, sequence };
  }

  for (const known of schedule.known) {
    if (known === span?.end) await take("teacher", span.start, byTeacher);
    await take("student", known, byStudent);
  }
  if (span?.end * width === noise.length) await take("teacher", span.start, byTeacher);
  return steps;
}
