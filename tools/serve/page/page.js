"use strict";
// Asks every model that is served the same thing at once, and shows the answers beside each other as they come.
// Whatever a person or a model wrote becomes a text node, never HTML.

const $ = (id) => document.getElementById(id);
const settings = [...$("ask").querySelectorAll("[name]")];
const CUT = "What is here is not the whole answer; it is left out of what is asked next.";
const TITLES = {
  400: "This cannot be answered", 401: "The key is not the right one", 413: "That is too long",
  429: "All slots are taken", 500: "The server failed", 503: "The server is not ready",
};

let key = ""; // in memory only: nothing of this page is stored
let models = []; // as /v1/models has them, the untuned one first
let turns = [];

class Failure extends Error {
  constructor(title, message, status) {
    super(message);
    Object.assign(this, {title, status});
  }
}

// --- the server ----------------------------------------------------------------------------------

async function request(path, body, signal) {
  const headers = {"content-type": "application/json"};
  if (key) headers.authorization = `Bearer ${key}`;
  const asked = {method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal};
  const response = await fetch(path, asked).catch((error) => {
    throw signal?.aborted ? error : new Failure("The server cannot be reached", "Is it still running?");
  });
  if (response.ok) return response;
  const told = await response.json().then(({error}) => error.message, () => response.statusText);
  const wait = response.headers.get("retry-after");
  const title = TITLES[response.status] ?? `The server answered ${response.status}`;
  throw new Failure(title, wait ? `${told} (in ${wait} s)` : told, response.status);
}

// Yields the chunks of an answer. An end without the stream's own "[DONE]" is a failure, however it came about.
async function* chunks(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = "", read; !(read = await reader.read()).done;) {
    const events = (held + read.value).split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Failure("The answer was broken off", `${chunk.error.message}. ${CUT}`);
      yield chunk;
    }
  }
  throw new Error("the stream ended before it was done");
}

// --- an answer -----------------------------------------------------------------------------------

class Reply {
  constructor(turn, model) {
    Object.assign(this, {turn, model, text: "", counts: false});
    this.box = copy("reply");
    this.part("when").textContent = role(model);
    this.box.classList.add(isBase(model) ? "before" : "after");
    this.box.setAttribute("aria-label", `${role(model)} ${model.id}`.trim());
    this.part("model").textContent = model.id;
    this.part("given").textContent = model.chat ? "" : turn.prompt;
    this.said = this.part("said").appendChild(new Text());
    this.part("end").addEventListener("click", () => this.stop());
    this.part("again").addEventListener("click", () => this.ask());
  }

  part(name) {
    return this.box.querySelector(`.${name}`);
  }

  stop() {
    this.control?.abort();
  }

  // Everything said before to this model and by it, less what never became an answer.
  conversation() {
    const said = this.turn.system ? [{role: "system", content: this.turn.system}] : [];
    for (const turn of turns.slice(0, turns.indexOf(this.turn))) {
      const reply = turn.replies.find(({model}) => model === this.model);
      if (!reply.counts) continue;
      said.push({role: "user", content: turn.prompt}, {role: "assistant", content: reply.text});
    }
    return [...said, {role: "user", content: this.turn.prompt}];
  }

  async ask() {
    const {model, turn} = this;
    const body = {model: model.id, ...turn.fields, stream: true, stream_options: {include_usage: true}};
    if (model.chat) body.messages = this.conversation();
    else body.prompt = turn.prompt;
    this.begin();
    const {signal} = this.control;
    try {
      const response = await request(model.chat ? "/v1/chat/completions" : "/v1/completions", body, signal);
      for await (const chunk of chunks(response)) this.take(chunk);
      this.counts = true;
      this.finish({stop: "finished", length: "cut off at max_tokens"}[this.reason] ?? this.reason);
    } catch (error) {
      if (signal.aborted) {
        this.counts = this.text !== "";
        this.finish("stopped by you");
      } else {
        this.fail(error instanceof Failure ? error : new Failure("The connection was lost", CUT));
      }
    } finally {
      this.control = null;
      this.box.setAttribute("aria-busy", "false");
      show(this.part("end"), false);
      refresh();
    }
  }

  begin() {
    Object.assign(this, {text: "", counts: false, pieces: 0, usage: null, reason: null, first: null});
    this.control = new AbortController();
    this.began = performance.now();
    this.said.data = "";
    this.box.classList.remove("failed", "empty");
    this.box.setAttribute("aria-busy", "true"); // read out once it is whole, not word by word
    show(this.part("end"), true);
    show(this.part("fault"), false);
    show(this.part("used"), false);
    this.part("state").textContent = "";
    refresh();
  }

  take({choices: [choice], usage}) {
    this.usage = usage ?? this.usage;
    if (!choice) return;
    this.reason = choice.finish_reason;
    this.last = performance.now();
    const piece = choice.text ?? choice.delta.content;
    if (!piece) return;
    this.first ??= this.last;
    this.pieces += 1;
    this.text += piece;
    following(() => {
      this.said.data = this.model.chat ? this.text.trimStart() : this.text;
      this.part("state").textContent = `${this.pieces} tokens so far`;
    });
  }

  finish(how) {
    const tokens = this.usage?.completion_tokens; // an answer that was stopped has none
    // The first token comes with the prompt's own computation: the pace is that of the others.
    const pace = tokens > 1 ? (tokens - 1) / ((this.last - this.first) / 1000) : null;
    const room = this.model.max_model_len - (this.usage?.prompt_tokens ?? 0);
    const {seed, ...sampling} = {...this.model.defaults, ...this.turn.fields};
    const facts = {
      model: this.model.id,
      finish_reason: this.reason ?? "none: stopped by you",
      "prompt, tokens": this.usage?.prompt_tokens ?? "not told",
      "answer, tokens": tokens ?? `at least ${this.pieces}`,
      "first token": this.first === null ? "none" : `after ${((this.first - this.began) / 1000).toFixed(2)} s`,
      ...sampling,
      max_tokens: Math.min(sampling.max_tokens, room),
      seed: sampling.temperature > 0 ? seed : `${seed} (unused: temperature 0)`,
    };
    if (this.model.chat) facts["system prompt"] = this.turn.system || this.model.system_prompt || "none";
    const short = [how, `${tokens ?? `at least ${this.pieces}`} tokens`];
    if (pace) short.push(`${pace.toFixed(1)} tokens/s`);
    following(() => {
      this.box.classList.toggle("empty", this.text === "");
      this.part("state").textContent = "";
      this.part("used").querySelector("summary").textContent = short.join(" · ");
      this.part("used").querySelector("dl").replaceChildren(...Object.entries(facts).flatMap(pair));
      this.part("used").hidden = false;
    });
  }

  fail({title, message, status}) {
    const [heading, text] = this.part("fault").querySelectorAll("strong, span");
    following(() => {
      this.box.classList.add("failed");
      this.part("state").textContent = "";
      heading.textContent = `${title}.`;
      text.textContent = message;
      this.part("fault").hidden = false;
    });
    if (status === 401) lock(title);
  }
}

const isBase = (model) => models.some(({parent}) => parent === model.id);
const role = (model) => (isBase(model) ? "Before" : models.some(isBase) ? "After" : "");

// --- the conversation ----------------------------------------------------------------------------

const running = () => turns.flatMap(({replies}) => replies).filter(({control}) => control);

function send() {
  const prompt = $("prompt").value;
  if (!prompt.trim() || running().length) return;
  const wrong = settings.find(({validity}) => !validity.valid);
  if (wrong) {
    $("settings").open = true;
    wrong.reportValidity();
    return;
  }
  const given = settings.filter(({value}) => value.trim());
  const {system = "", ...fields} = Object.fromEntries(given.map(({name, value}) => [name, value]));
  for (const name in fields) fields[name] = Number(fields[name]);
  fields.seed ??= crypto.getRandomValues(new Uint32Array(1))[0]; // one for all, so that they can be compared
  const turn = {prompt, system, fields, box: copy("turn")};
  const [asked, replies] = turn.box.children;
  asked.textContent = prompt;
  asked.hidden = !models.some(({chat}) => chat);
  turn.replies = models.map((model) => new Reply(turn, model));
  replies.append(...turn.replies.map(({box}) => box));
  turns.push(turn);
  $("talk").append(turn.box);
  $("prompt").value = "";
  for (const reply of turn.replies) reply.ask();
  scrollTo(0, document.documentElement.scrollHeight);
}

function stopAll() {
  for (const reply of running()) reply.stop();
}

function startAnew() {
  stopAll();
  turns = [];
  $("talk").replaceChildren();
  refresh();
  $("prompt").focus();
}

function refresh() {
  const busy = running().length > 0;
  show($("stop"), busy);
  show($("send"), !busy);
  show($("new"), turns.length > 0);
  show($("welcome"), turns.length === 0);
}

// Shows something, or hides it; the focus is never lost with it.
function show(box, shown) {
  if (!shown && box.contains(document.activeElement)) $("prompt").focus();
  box.hidden = !shown;
}

// Does what adds to the page, and keeps its end in sight if it was.
function following(change) {
  const page = document.documentElement;
  const atEnd = page.scrollHeight - innerHeight - scrollY < 80;
  change();
  if (atEnd) scrollTo(0, page.scrollHeight);
}

const copy = (id) => document.importNode($(id).content, true).firstElementChild;

function element(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

const pair = ([name, value]) => [element("dt", name), element("dd", value)];

// --- the page ------------------------------------------------------------------------------------

async function open() {
  try {
    const {data} = await (await request("/v1/models")).json();
    models = data.sort((one, other) => (one.parent === other.id) - (other.parent === one.id));
  } catch (error) {
    return lock(`${error.title}. ${error.message}`);
  }
  $("door").hidden = true;
  $("ask").hidden = false;
  introduce();
  refresh();
  $("prompt").focus();
}

function lock(why) {
  $("why").textContent = why;
  $("lock").hidden = $("kept").hidden = !("key" in document.body.dataset);
  $("door").hidden = false;
  $("key").select();
}

function introduce() {
  const main = models.at(-1);
  const chats = models.some(({chat}) => chat);
  const pairs = models.length > 1;
  document.title = $("name").textContent = main.id;
  $("about").textContent = `${main.max_model_len.toLocaleString("en")} tokens of context`;
  $("hello").textContent = pairs ? "Before and after, side by side." : chats ? "Say hello." : "Begin a text.";
  $("how").textContent = pairs
    ? "Ask once, and both answer: the model as it was, and what your training made of it."
    : chats ? "It answers from where it is served; this page asks nobody else."
      : "The model goes on where you stop: it has no chat template.";
  $("welcome").classList.toggle("alone", !pairs);
  $("faces").setAttribute("viewBox", pairs ? "0 0 124 64" : "62 0 62 64"); // the smile alone
  $("prompt").placeholder = chats ? (pairs ? "Ask both" : "Say something") : "Begin a text";
  $("system-field").hidden = !chats;
  $("examples").replaceChildren(...main.examples.map((text) => {
    const button = element("button", text);
    button.type = "button";
    button.addEventListener("click", () => {
      $("prompt").value = text;
      send();
    });
    return button;
  }));
  for (const field of settings) {
    const own = field.name === "system" ? main.system_prompt || "none" : main.defaults[field.name];
    if (own !== undefined) field.placeholder = own;
  }
}

function showChanged() {
  const changed = settings.filter(({value, validity}) => value.trim() || validity.badInput);
  const told = changed.map(({name, value}) => (name === "system" ? "system prompt" : `${name} ${value}`));
  $("defaults").hidden = told.length === 0;
  $("changed").textContent = told.length ? told.join(" · ") : "the server's own";
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("ask").addEventListener("input", showChanged);
$("defaults").addEventListener("click", () => {
  for (const field of settings) field.value = "";
  showChanged();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", stopAll);
$("new").addEventListener("click", startAnew);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stopAll();
});
$("door").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  if (/[^!-~]/.test(key)) lock("No key has such characters."); // nor could a header carry them
  else open();
});

showChanged();
if ("key" in document.body.dataset) lock("This server asks for a key.");
else open();
