// Next words while somebody types, over a WebSocket. For Node 22 or newer; a page does the same with its input field.
// Beside a running server: node examples/typing.mjs "오늘 날씨가"

const PAUSE_MS = 300; // send once nothing was typed for so long
const text = process.argv[2] ?? "오늘 날씨가";
const url = new URL("/ws/example", process.env.DURE_URL ?? "http://127.0.0.1:8000");
url.protocol = url.protocol === "https:" ? "wss:" : "ws:";

const socket = new WebSocket(url);
let timer;
let id = 0;

function typed(value) {
  clearTimeout(timer);
  timer = setTimeout(() => socket.send(JSON.stringify({ type: "input", text: value, top_k: 3, id: ++id })), PAUSE_MS);
}

socket.onopen = () => {
  for (let end = 1; end <= text.length; end++) typed(text.slice(0, end)); // as a field's `input` events come
};

socket.onmessage = ({ data }) => {
  const answer = JSON.parse(data);
  if (answer.type === "error") {
    console.error(answer.message); // with `retry_after` and perhaps a `ticket` if the queue is full
    process.exitCode = 1;
  } else if (answer.id === id) {
    for (const { append, confidence } of answer.data) console.log(`${answer.input}${append}  ${confidence.toFixed(3)}`);
  }
  socket.close(1000);
};

socket.onclose = ({ code, reason }) => {
  if (code === 1000) return;
  console.error(`closed with ${code} ${reason}`); // 1012 and 1013: connect again later
  process.exitCode = 1;
};
