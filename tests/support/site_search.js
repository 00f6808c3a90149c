// What the search of a built site finds, by the site's own worker: node site_search.js SITE WORDS …
// Prints a JSON object: the addresses of the pages found, by words, best first.
const fs = require("fs"), path = require("path");
const [site, ...words] = process.argv.slice(2);
const folder = path.join(site, "assets/javascripts/workers");
const SETUP = 0, QUERY = 2, RESULT = 3; // kinds of messages of mkdocs-material

let receive, answered;
globalThis.self = globalThis;
globalThis.addEventListener = (_, listener) => (receive = listener);
globalThis.postMessage = (message) => answered(message);
globalThis.__search = { worker: "" };
const send = (message) => new Promise((resolve) => { answered = resolve; receive({ data: message }); });

async function main() {
  require(path.resolve(folder, fs.readdirSync(folder).find((name) => /^search\..*\.js$/.test(name))));
  const index = JSON.parse(fs.readFileSync(path.join(site, "search/search_index.json"), "utf8"));
  await send({ type: SETUP, data: { ...index, options: { suggest: false } } });
  const found = {};
  for (const each of words) {
    const answer = await send({ type: QUERY, data: each });
    if (answer.type !== RESULT) throw new Error(`the worker answers ${JSON.stringify(answer)}`);
    found[each] = answer.data.items.map((sections) => sections[0].location);
  }
  console.log(JSON.stringify(found));
}
main();
