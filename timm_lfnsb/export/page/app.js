// The page: choose, drop or film; show boxes, names and bars. What it computes is in faces.js.
import { Recognizer, copyPicture, readPicture } from './faces.js';

const COLORS = ['#0072b2', '#b84a00', '#00785a', '#a3528a', '#7a6a00', '#2a7fae', '#444444'];
const VIEW_SIDE = 1600; // pixels of the picture as it is shown
const QUIET = 2000; // milliseconds between two things that a screen reader is told about the camera

const element = (id) => document.getElementById(id);
const [status, view, video, camera] = ['status', 'view', 'video', 'camera'].map(element);
const percent = (value) => `${Math.round(100 * value)} %`;
const nextFrame = () => new Promise((resolve) => { requestAnimationFrame(() => setTimeout(resolve)); });

let latest = 0; // number of the last thing that was asked for: whatever is older stops

function say(text, failed = false) {
  status.textContent = text;
  status.classList.toggle('failed', failed);
}

const ready = Recognizer.load().catch((error) => {
  throw new Error(`The networks cannot be loaded (${error.message}): load the page anew, or ask whoever runs it.`);
});
ready.then(() => { if (latest === 0) say('Ready.'); }, (error) => say(error.message, true));

/** Do what the user asked for, and say what failed. `work` is given a function that says whether it is still wanted. */
async function run(work) {
  latest += 1;
  const number = latest;
  const wanted = () => number === latest;
  try {
    await work(await ready, wanted);
  } catch (error) {
    console.error(error);
    if (wanted()) say(error.message, true);
  }
}

const showPhotograph = (file) => run(async (recognizer, wanted) => {
  say(`Looking for faces in ${file.name} …`);
  await nextFrame(); // so that this is seen
  const picture = await readPicture(file).catch(() => {
    throw new Error(`${file.name} is damaged, or no picture that this browser can read: try it as JPEG or PNG.`);
  });
  const result = await recognizer.recognize(picture);
  if (!wanted()) return;
  show(picture, result, recognizer.config.label_names);
  say(`${file.name}: ${summary(result.faces)}`);
});

const openCamera = async () => {
  if (!navigator.mediaDevices) throw new Error('A camera needs a page from https or localhost.');
  return navigator.mediaDevices.getUserMedia({ video: { facingMode: 'user', width: { ideal: 640 } } }).catch((error) => {
    throw new Error(`The camera cannot be used (${error.message}): allow it in the browser, or choose a photograph.`);
  });
};

const film = () => run(async (recognizer, wanted) => {
  say('Waiting for the camera …');
  const stream = await openCamera();
  try {
    video.srcObject = stream;
    await video.play();
    camera.textContent = 'Stop the camera';
    let [said, when] = ['', -QUIET];
    while (wanted() && stream.active) {
      const picture = copyPicture(video, video.videoWidth, video.videoHeight);
      const result = await recognizer.recognize(picture, false);
      if (!wanted()) break;
      show(picture, result, recognizer.config.label_names);
      const text = `Camera: ${summary(result.faces)}`;
      if (text !== said && performance.now() - when > QUIET) {
        say(text);
        [said, when] = [text, performance.now()];
      }
      await nextFrame();
    }
  } finally {
    stream.getTracks().forEach((track) => track.stop());
    camera.textContent = 'Use the camera';
  }
});

function summary(faces) {
  if (!faces.length) return 'no face found. Faces should be upright and at least ten pixels wide.';
  return `${faces.length} ${faces.length === 1 ? 'face' : 'faces'}: ${faces.map(({ label }) => label).join(', ')}.`;
}

/** A new element with a class, in a parent. */
function add(parent, tag, className = '') {
  const child = Object.assign(document.createElement(tag), { className });
  parent.append(child);
  return child;
}

/** Make a list of elements as long as it has to be. Those that stay are kept, so that a screen reader keeps its place. */
function resize(parent, selector, count, make) {
  const items = [...parent.querySelectorAll(selector)];
  items.slice(count).forEach((item) => item.remove());
  while (items.length < count) items.push(make());
  return items.slice(0, count);
}

function show(picture, { faces, detectTime, nameTime }, labelNames) {
  const copy = copyPicture(picture, picture.width, picture.height, VIEW_SIDE);
  Object.assign(view, { width: copy.width, height: copy.height });
  view.getContext('2d').drawImage(copy, 0, 0);
  view.setAttribute('aria-label', `The picture: ${summary(faces)}`);
  element('result').hidden = false;
  element('time').textContent = `${Math.round(detectTime + nameTime)} ms a frame: ${Math.round(detectTime)} ms for `
    + `finding faces, ${Math.round(nameTime)} ms for naming expressions`;
  const boxes = resize(element('picture'), '.box', faces.length, () => {
    const box = add(element('picture'), 'div', 'box');
    box.setAttribute('aria-hidden', 'true'); // the list says the same
    add(box, 'span');
    return box;
  });
  const cards = resize(element('faces'), 'li', faces.length, () => {
    const card = add(element('faces'), 'li');
    add(card, 'h2');
    const table = add(card, 'table');
    for (const name of labelNames) {
      const row = add(table, 'tr');
      Object.assign(add(row, 'th'), { scope: 'row', textContent: name });
      add(add(add(row, 'td'), 'div', 'bar'), 'div');
      add(row, 'td');
    }
    return card;
  });
  faces.forEach(({ box: [x, y, width, height], label, probabilities }, i) => {
    const color = COLORS[i % COLORS.length];
    [boxes[i], cards[i]].forEach((item) => item.style.setProperty('--color', color));
    Object.entries({ left: x / picture.width, top: y / picture.height, width: width / picture.width,
      height: height / picture.height }).forEach(([side, share]) => { boxes[i].style[side] = percentage(share); });
    boxes[i].classList.toggle('right', x + width / 2 > picture.width / 2);
    boxes[i].classList.toggle('top', y < 0.1 * picture.height);
    boxes[i].firstChild.textContent = (width / picture.width) * view.clientWidth > 60 ? `${i + 1} ${label}` : i + 1;
    cards[i].querySelector('h2').textContent = `${i + 1} ${label}`;
    cards[i].querySelectorAll('tr').forEach((row, k) => {
      row.querySelector('.bar div').style.width = percentage(probabilities[k]);
      row.lastChild.textContent = percent(probabilities[k]);
    });
  });
}

const percentage = (share) => `${100 * share}%`;

element('file').addEventListener('change', ({ target }) => {
  if (target.files.length) showPhotograph(target.files[0]);
  target.value = ''; // so that the same file can be chosen again
});
camera.addEventListener('click', () => {
  if (camera.textContent.startsWith('Stop')) latest += 1; else film();
});
for (const kind of ['dragenter', 'dragover', 'dragleave', 'drop']) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle('drop', kind === 'dragenter' || kind === 'dragover');
    if (kind === 'drop' && event.dataTransfer.files.length) showPhotograph(event.dataTransfer.files[0]);
  });
}
