// Gives sentences of the server in a language, as JSON: node said.mjs FOLDER OF web/js ENGLISH.json LOCALE.json
// test_said.py reads it.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [folder, ...locales] = process.argv.slice(2);
const { tellerOf } = await import(pathToFileURL(`${folder}/panel/said.js`));
const said = tellerOf(...locales.map((file) => JSON.parse(readFileSync(file)).spillway));
console.log(JSON.stringify(JSON.parse(readFileSync(0)).map(said)));
