#!/usr/bin/env python
"""Side-by-side baseline: TRL GRPOTrainer (transformers generate), on a CPU or a GPU.
Splits wall time into generate / logprob (no-grad old+ref passes) / update (rest of training_step + optimizer).
  python trl_grpo.py --model smol --prompts 8 --gens 4 --prompt-len 32 --new 64 --steps 3"""
import argparse, json, time, statistics, sys, os, warnings
warnings.filterwarnings("ignore")
T0=time.perf_counter()
p=argparse.ArgumentParser()
p.add_argument("--model",choices=["smol","tiny"],default="smol"); p.add_argument("--prompts",type=int,default=8)
p.add_argument("--gens",type=int,default=4); p.add_argument("--prompt-len",type=int,default=32); p.add_argument("--new",type=int,default=64)
p.add_argument("--steps",type=int,default=3); p.add_argument("--micro",type=int,default=8); p.add_argument("--beta",type=float,default=0.04)
p.add_argument("--iterations",type=int,default=1,help="num_iterations (mu): optimiser steps per rollout batch")
p.add_argument("--bf16",type=int,default=1,help="TRL default on CPU is 1"); p.add_argument("--gc",type=int,default=1,help="gradient checkpointing, TRL default 1")
p.add_argument("--fixed-len",type=int,default=1,help="suppress EOS so that every completion has --new tokens")
p.add_argument("--threads",type=int,default=2); p.add_argument("--seed",type=int,default=0); p.add_argument("--onednn",type=int,default=0)
p.add_argument("--device",choices=["cpu","cuda"],default="cpu")
a=p.parse_args()
import torch
from common import make_model, peak_memory_mb, wait
from data import prompts_for
torch.set_num_threads(a.threads)
if a.onednn: torch.backends.mkldnn.matmul.fp32_precision="bf16"
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
import trl, transformers
transformers.logging.set_verbosity_error()
tok,pr=prompts_for(a.model,a.prompts*(a.steps+1),a.prompt_len,a.seed)
ds=Dataset.from_dict({"prompt":pr})
model=make_model(a.model,torch.float32)
if a.model=="tiny":   # TRL reloads the reference model from a path
    import tempfile; d=tempfile.mkdtemp(); model.save_pretrained(d); from transformers import AutoModelForCausalLM; model=AutoModelForCausalLM.from_pretrained(d)
def reward(completion_ids,**k): return [sum(1 for t in c if t%2==0)/max(1,len(c)) for c in completion_ids]
B=a.prompts*a.gens
gk={"min_new_tokens":a.new} if a.fixed_len else None
args=GRPOConfig(output_dir=__import__("tempfile").mkdtemp(),per_device_train_batch_size=a.micro,gradient_accumulation_steps=B//a.micro,num_generations=a.gens,
  max_completion_length=a.new,max_steps=a.steps*a.iterations,num_iterations=a.iterations,beta=a.beta,temperature=1.0,learning_rate=1e-6,logging_steps=1,report_to=[],
  save_strategy="no",use_cpu=a.device=="cpu",bf16=bool(a.bf16),gradient_checkpointing=bool(a.gc),generation_kwargs=gk,seed=a.seed,disable_tqdm=True,shuffle_dataset=False,dataloader_num_workers=0)
ref_kwargs={}
tr=GRPOTrainer(model=model,reward_funcs=reward,args=args,train_dataset=ds,processing_class=tok)
acc={"generate":0.,"logprob":0.,"comp":0}
def wrap(obj,name,key,cond=lambda:True):
    f=getattr(obj,name)
    def g(*x,**k):
        if not cond(): return f(*x,**k)
        wait(); t=time.perf_counter(); r=f(*x,**k); wait(); acc[key]+=time.perf_counter()-t; return r
    setattr(obj,name,g)
wrap(tr,"_generate_single_turn","generate")
wrap(tr,"_get_per_token_logps_and_entropies","logprob",lambda: not torch.is_grad_enabled())
marks=[]
from transformers import TrainerCallback
class CB(TrainerCallback):
    def on_step_end(self,*x,**k): wait(); marks.append((time.perf_counter(),acc["generate"],acc["logprob"]))
tr.add_callback(CB())
t_start=time.perf_counter(); tr.train()
pts=[(t_start,0,0)]+marks[a.iterations-1::a.iterations]
rows=[(b[0]-x[0],b[1]-x[1],b[2]-x[2]) for x,b in zip(pts,pts[1:])]
rows2=rows[1:] if len(rows)>1 else rows   # first step = warm-up
m=[statistics.median(r[i] for r in rows2) for i in range(3)]
tokens=B*a.new
print(json.dumps(dict(bench="trl_grpo",trl=trl.__version__,cfg=vars(a),steps=len(rows2),step_s=round(m[0],3),generate_s=round(m[1],3),logprob_s=round(m[2],3),update_s=round(m[0]-m[1]-m[2],3),
  sampled_tok=tokens,tok_per_s=round(tokens/m[0],1),gen_tok_per_s=round(tokens/m[1],1),first_step_s=round(rows[0][0],2),cold_to_first_step_s=round(marks[0][0]-T0,2),peak_memory_mb=round(peak_memory_mb()),mean_len=tr.state.log_history[0].get("completions/mean_length"))))
