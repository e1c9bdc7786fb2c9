"""A chat for the browser in one page, which loads nothing from elsewhere."""

HTML = """<!doctype html><meta charset=utf-8><title>dsv3_jax</title>
<style>
body{font:16px/1.5 system-ui;max-width:46em;margin:2em auto;padding:0 1em}
#log div{white-space:pre-wrap;margin:.7em 0}.user{color:#666}.drafted{color:#0a7a3c}
form{display:flex;gap:.5em}textarea{flex:1}
</style>
<h1>dsv3_jax</h1><p>Tokens that the MTP module guessed are <span class=drafted>green</span>.</p>
<div id=log></div>
<form><textarea rows=2 autofocus></textarea><button>Send</button></form>
<script>
const log=document.querySelector('#log'),form=document.querySelector('form'),messages=[];
let key='';
const ask=async()=>{
  const headers={'content-type':'application/json'};
  if(key)headers.authorization='Bearer '+key;
  const body=JSON.stringify({messages,stream:true,max_tokens:300});
  return fetch('/v1/chat/completions',{method:'POST',headers,body})};
const line=kind=>{const d=document.createElement('div');d.className=kind;log.append(d);return d};
form.onsubmit=async event=>{
  event.preventDefault();
  const area=form.querySelector('textarea');
  messages.push({role:'user',content:area.value});
  line('user').textContent=area.value;area.value='';
  let answer=await ask();
  if(answer.status==401){key=prompt('API key')||'';answer=await ask()}
  const shown=line('assistant');
  if(!answer.ok){messages.pop();shown.textContent=(await answer.json()).error.message;return}
  const reader=answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest='',text='';
  for(;;){
    const {done,value}=await reader.read();
    if(done)break;
    const parts=(rest+value).split('\\n\\n');rest=parts.pop();
    for(const part of parts){
      if(part=='data: [DONE]')continue;
      const data=JSON.parse(part.slice(6)),choice=(data.choices||[])[0];
      if(data.error){shown.append(data.error.message);continue}
      if(!choice||!choice.delta.content)continue;
      const span=document.createElement('span');
      if(choice.drafted)span.className='drafted';
      span.textContent=choice.delta.content;text+=choice.delta.content;shown.append(span)}}
  messages.push({role:'assistant',content:text})};
</script>
"""
