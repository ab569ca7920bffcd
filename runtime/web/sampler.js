/** The one sampler of every family, as runtime/sampler.py: `known` positions stay, the rest is the noise. */
import { nearestCodes } from "./teacher.js";

/**
 * The steps of one image in order; the last one is the result.
 * student(latents, known) -> { sequence: float32 (L*Cv), tokens: int32 (S) }.
 * generate(span, prefix) -> int32 (end). noise: float32 (L*Cv). codebook: float32 (V*Cv), for schedules with a teacher. width: Cv.
 */
export async function sample({ student, generate, codebook, noise, schedule, width }) {
  const steps = [];
  const span = schedule.teacher;
  const timed = async (step) => {
    const began = performance.now();
    const made = await step();
    steps.push({ ...made, seconds: (performance.now() - began) / 1000 });
  };
  for (const known of schedule.known) {
    if (span && known === span.end) await timed(teacherStep);
    await timed(() => studentStep(known));
  }
  if (span && span.end * width === noise.length) await timed(teacherStep);
  return steps;

  async function studentStep(known) {
    const before = steps.at(-1);
    const { sequence, tokens } = await student(merged(before?.sequence, known), known);
    // What is kept was decided before: its token is the one reported then, as in the published code.
    if (before) tokens.set(before.tokens.subarray(0, Math.min(known, tokens.length)));
    return { role: "student", known, tokens, sequence };
  }

  async function teacherStep() {
    const before = steps.at(-1);
    const own = before?.tokens.subarray(0, span.start) ?? new Int32Array(0);
    // Behind the student's split the nearest codebook entries.
    const rest = before?.sequence.subarray(own.length * width, span.start * width) ?? new Float32Array(0);
    const prefix = Int32Array.from([...own, ...nearestCodes(rest, codebook, width)]);
    const tokens = await generate(span, prefix);
    const sequence = noise.slice();
    const entry = (token) => codebook.subarray(token * width, (token + 1) * width);
    tokens.forEach((token, i) => sequence.set(entry(token), i * width));
    return { role: "teacher", known: span.start, tokens, sequence };
  }

  function merged(sequence, known) {
    const latents = noise.slice();
    if (sequence) latents.set(sequence.subarray(0, known * width));
    return latents;
  }
}
