// The page: choose, drop or film; show boxes, names and bars. What it computes is in faces.js.
import { Recognizer, copyPicture, readPicture } from './faces.js';

const COLORS = ['#0072b2', '#b84a00', '#00785a', '#a3528a', '#7a6a00', '#2a7fae'];
const VIEW_SIDE = 1600; // pixels of the picture as it is shown
const QUIET = 2000; // milliseconds between two things that a screen reader is told about the camera

const element = (id) => document.getElementById(id);
const [status, view, video, camera] = ['status', 'view', 'video', 'camera'].map(element);
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
    if (!wanted()) return;
    element('result').hidden = true; // it belongs to something else
    say(error.message, true);
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

async function openCamera() {
  if (!navigator.mediaDevices) throw new Error('A camera needs a page from https or localhost: choose a photograph.');
  const wish = { video: { facingMode: 'user', width: { ideal: 640 } } };
  return navigator.mediaDevices.getUserMedia(wish).catch((error) => {
    throw new Error(`The camera cannot be used (${error.message}): allow it in the browser, or choose a photograph.`);
  });
}

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
      const result = await recognizer.recognize(picture);
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
  if (!faces.length) return 'no face found. Faces must be upright, and not tiny.';
  const labels = faces.map(({ label }) => label);
  if (labels.length === 1) return `1 face: ${labels[0]}.`;
  const counts = [...new Set(labels)].map((name) => `${labels.filter((label) => label === name).length} ${name}`);
  return `${labels.length} faces: ${counts.join(', ')}.`;
}

/** Exactly `count` children of a class, new ones from the template of that name; readers keep their place in others. */
function fit(parent, name, count) {
  const items = [...parent.getElementsByClassName(name)];
  items.splice(count).forEach((item) => item.remove());
  while (items.length < count) {
    parent.append(element(name).content.cloneNode(true));
    items.push(parent.lastElementChild);
  }
  return items;
}

function show(picture, { faces, detectTime, nameTime }, labelNames) {
  const copy = copyPicture(picture, picture.width, picture.height, VIEW_SIDE);
  Object.assign(view, { width: copy.width, height: copy.height }).getContext('2d').drawImage(copy, 0, 0);
  view.setAttribute('aria-label', `The picture: ${summary(faces)}`);
  element('result').hidden = false;
  const [all, finding, naming] = [detectTime + nameTime, detectTime, nameTime].map((time) => `${Math.round(time)} ms`);
  element('time').textContent = `${all} for this picture: ${finding} to find faces, ${naming} to name expressions`;
  const boxes = fit(element('picture'), 'box', faces.length);
  const cards = fit(element('faces'), 'face', faces.length);
  faces.forEach(({ box: [x, y, width, height], label, probabilities }, i) => {
    const color = `--color: ${COLORS[i % COLORS.length]}`;
    const share = (pixels, whole) => `${(100 * pixels) / whole}%`;
    boxes[i].style.cssText = `${color}; left: ${share(x, picture.width)}; top: ${share(y, picture.height)}; `
      + `width: ${share(width, picture.width)}; height: ${share(height, picture.height)}`;
    boxes[i].classList.toggle('right', x + width / 2 > picture.width / 2);
    boxes[i].classList.toggle('top', y < 0.1 * picture.height);
    boxes[i].firstChild.textContent = (width / picture.width) * view.clientWidth > 60 ? `${i + 1} ${label}` : i + 1;
    cards[i].style.cssText = color;
    cards[i].querySelector('h2').textContent = `${i + 1} ${label}`;
    fit(cards[i].querySelector('tbody'), 'row', labelNames.length).forEach((row, k) => {
      const [name, bar, value] = row.children;
      name.textContent = labelNames[k];
      bar.style.setProperty('--share', share(probabilities[k], 1));
      value.textContent = `${Math.round(100 * probabilities[k])} %`;
    });
  });
}

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
