// The command line that makes a stream again, where one does.

const OPTIONS = ["model", "recipe", "levels", "base", "codec", "dtype", "device"]; // of generate, as /v1/models tells them

function down(value) { return Math.floor(value * 1e4) / 1e4; } // never past the block that it begins with
function quoted(text) { return /^[\w./:=@+-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`; }

// Why `longtake generate` does not make the same, or "" where it does.
// stream: { seed, made, forked, rewound, prompts: [{ at, prompt, how }], asked }, in seconds of all that was made.
export function hindrance({ forked, rewound, prompts, asked }) {
  if (asked?.size) return "a change is on its way: try again when it shows";
  if (forked) return "it goes on from a snapshot";
  if (rewound) return "it was rewound";
  if (prompts.some((one) => one.how)) return `it holds a ${prompts.find((one) => one.how).how}`;
  if (prompts.some((one, number) => number && one.at <= prompts[number - 1].at)) return "words were changed before they showed";
  if (prompts.some(({ prompt }) => /\||\[\s*[\d.]+\s*[s%]?\s*:/.test(prompt))) return "words hold marks of time";
  if (/^\d+(\.\d+)?\s*s\s*:/.test(prompts[0].prompt) || prompts[0].prompt.startsWith("-")) return "words hold marks of time";
  return "";
}

// made: seconds, 0 for a stream that is still to come.
export function commandLine(model, { seed, made, prompts }) {
  const text = prompts.map(({ at, prompt }, number) => (number ? `${down(at)}s: ${prompt}` : prompt)).join(" | ");
  const parts = ["longtake generate", `'${text.replaceAll("'", `'\\''`)}'`];
  for (const [option, value] of Object.entries({ ...model, model: model.id })) {
    if (OPTIONS.includes(option) && value !== null) parts.push(`--${option} ${quoted(String(value))}`);
  }
  parts.push(`--seed ${seed}`);
  if (made) parts.push(`--seconds ${down(made)}`);
  return parts.join(" ");
}
