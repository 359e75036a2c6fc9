// An open loop for k6: texts are sent when their time has come, whether or not earlier ones are
// answered. benchmarks/load.py runs it; each request leaves one line of JSON in k6's log.
import http from "k6/http";
import exec from "k6/execution";
import { SharedArray } from "k6/data";

const plan = JSON.parse(__ENV.PLAN);
const texts = new SharedArray("texts", () => JSON.parse(open(__ENV.TEXTS)));

export const options = {
  scenarios: {
    load: {
      executor: "ramping-arrival-rate",
      startRate: plan.stages[0].target,
      timeUnit: "1m",
      preAllocatedVUs: plan.clients,
      maxVUs: plan.clients,
      stages: plan.stages,
      gracefulStop: "120s",
    },
  },
  discardResponseBodies: false,
  summaryTrendStats: [],
};

export default function () {
  const number = exec.scenario.iterationInTest;
  const id = `${plan.name}-${number}`;
  const body = Object.assign({}, texts[number % texts.length]);
  const turn = Math.floor(number / texts.length);
  if (turn > 0) {
    // Another conversation: one that comes again is not kept for distillation.
    body.messages = [{ role: "user", content: `${body.messages[0].content} (${turn})` }];
  }
  const sent = Date.now();
  const answer = http.post(`${plan.url}/v1/score`, JSON.stringify(body), {
    headers: {
      "Content-Type": "application/json",
      "X-Request-Id": id,
      Authorization: `Bearer ${plan.key}`,
    },
    timeout: "300s",
  });
  console.log(
    JSON.stringify({
      id,
      sent,
      status: answer.status,
      seconds: answer.timings.duration / 1000,
      // What the time went on before the first byte came back.
      waited: answer.timings.waiting / 1000,
      echoed: answer.headers["X-Request-Id"] || null,
      retry_after: answer.headers["Retry-After"] || null,
      answer: answer.status === 200 ? answer.json("id") : null,
      code: answer.status === 200 || !answer.body ? null : answer.json("error.code"),
    }),
  );
}
