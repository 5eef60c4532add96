// A tool loop with Vercel's AI SDK, streamed.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const { SLIPSTREAM_URL, PROMPT, SYSTEM } = process.env;
const provider = createOpenAICompatible({ name: "slipstream", baseURL: `${SLIPSTREAM_URL}/v1`, apiKey: "none" });
const lookUp = tool({
  description: "Look up the weather in a city.",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) =>
    `It is sunny in ${city}, with light winds from the north and no rain expected before the evening.`,
});
const result = streamText({
  model: provider("scripted"),
  system: SYSTEM,
  prompt: PROMPT,
  tools: { look_up: lookUp },
  stopWhen: stepCountIs(6),
});
console.log(await result.text);
