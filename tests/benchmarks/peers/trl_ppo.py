#!/usr/bin/env python
"""Side-by-side baseline: TRL PPOTrainer, on a CPU or a GPU. PPO left TRL after 1.12 (PR #7020), so this runs on TRL 1.12.0 (trl.experimental.ppo),
installed apart:  pip install --no-deps --target trl112 trl==1.12.0   (TRL112 in the environment names the folder)
It needs FOUR models (policy, reference, value, reward); reward here is a free programmatic stand-in unless --reward same.
  python trl_ppo.py --model smol --rollouts 32 --epochs 4 --minibatches 1 --steps 2"""
import argparse, json, time, statistics, sys, os, warnings
os.environ["TRL_EXPERIMENTAL_SILENCE"]="1"
warnings.filterwarnings("ignore")
T0=time.perf_counter()
sys.path.insert(0,os.environ.get("TRL112") or os.path.join(os.path.dirname(os.path.abspath(__file__)),"trl112"))
p=argparse.ArgumentParser()
p.add_argument("--model",choices=["smol","tiny"],default="smol"); p.add_argument("--rollouts",type=int,default=32)
p.add_argument("--prompt-len",type=int,default=32); p.add_argument("--new",type=int,default=64); p.add_argument("--steps",type=int,default=2)
p.add_argument("--epochs",type=int,default=4); p.add_argument("--minibatches",type=int,default=1); p.add_argument("--micro",type=int,default=8)
p.add_argument("--rollout-batch",type=int,default=32,help="local_rollout_forward_batch_size (TRL default 64)")
p.add_argument("--reward",choices=["rule","same"],default="rule"); p.add_argument("--bf16",type=int,default=1); p.add_argument("--gc",type=int,default=1)
p.add_argument("--threads",type=int,default=2); p.add_argument("--seed",type=int,default=0); p.add_argument("--onednn",type=int,default=0)
p.add_argument("--device",choices=["cpu","cuda"],default="cpu")
a=p.parse_args()
import torch, torch.nn as nn
from types import SimpleNamespace
from common import make_model, peak_memory_mb, wait
from data import prompts_for
torch.set_num_threads(a.threads)
if a.onednn: torch.backends.mkldnn.matmul.fp32_precision="bf16"
from datasets import Dataset
import trl, transformers
from trl.experimental.ppo import PPOConfig, PPOTrainer
import trl.experimental.ppo.ppo_trainer as M
transformers.logging.set_verbosity_error()
tok,pr=prompts_for(a.model,a.rollouts*(a.steps+1),a.prompt_len,a.seed)
ds=Dataset.from_dict({"input_ids":[tok(x,add_special_tokens=False)["input_ids"][:a.prompt_len] for x in pr]})
policy=make_model(a.model); ref=make_model(a.model)
policy.generation_config.eos_token_id=None; policy.generation_config.pad_token_id=tok.pad_token_id   # every response has --new tokens
class Critic(nn.Module):
    base_model_prefix="model"
    def __init__(s,lm):
        super().__init__(); s.model=lm.model; s.config=lm.config; s.score=nn.Linear(lm.config.hidden_size,1,bias=False); nn.init.zeros_(s.score.weight)
class Rule(nn.Module):
    """zero-cost reward model: returns token parity as its 'hidden state'"""
    base_model_prefix="bb"
    def __init__(s): super().__init__(); s.p=nn.Parameter(torch.zeros(1)); s.bb=s._bb
    def _bb(s,input_ids,**k): return SimpleNamespace(hidden_states=[(input_ids%2==0).float().mean(1,keepdim=True)[...,None].expand(*input_ids.shape,1)])
    def score(s,h): return h
value=Critic(make_model(a.model)); reward=Critic(make_model(a.model)) if a.reward=="same" else Rule()
args=PPOConfig(output_dir=__import__("tempfile").mkdtemp(),per_device_train_batch_size=a.micro,gradient_accumulation_steps=a.rollouts//a.micro//a.minibatches,num_mini_batches=a.minibatches,
  num_ppo_epochs=a.epochs,total_episodes=a.rollouts*a.steps,response_length=a.new,local_rollout_forward_batch_size=a.rollout_batch,temperature=1.0,learning_rate=1e-6,num_sample_generations=0,
  logging_steps=1,report_to=[],save_strategy="no",use_cpu=a.device=="cpu",bf16=bool(a.bf16),gradient_checkpointing=bool(a.gc),seed=a.seed,kl_coef=0.05,disable_tqdm=True)
from transformers import DataCollatorWithPadding
tr=PPOTrainer(args=args,processing_class=tok,model=policy,ref_model=ref,reward_model=reward,value_model=value,train_dataset=ds)
acc={"generate":0.,"logprob":0.}; depth=[0]
def wrapf(name,key,cond=lambda:True):
    f=getattr(M,name)
    def g(*x,**k):
        if not cond(): return f(*x,**k)
        wait(); t=time.perf_counter(); r=f(*x,**k); wait(); acc[key]+=time.perf_counter()-t; return r
    setattr(M,name,g)
wrapf("batch_generation","generate"); wrapf("forward","logprob",lambda: not torch.is_grad_enabled()); wrapf("get_reward","logprob",lambda: not torch.is_grad_enabled())
marks=[]
from transformers import TrainerCallback
class CB(TrainerCallback):
    def on_step_end(self,*x,**k): wait(); marks.append((time.perf_counter(),acc["generate"],acc["logprob"]))
tr.add_callback(CB())
B=args.batch_size; assert B==a.rollouts,(B,args.batch_size,args.local_batch_size)
t0=time.perf_counter(); tr.train()
pts=[(t0,0,0)]+marks
rows=[(b[0]-x[0],b[1]-x[1],b[2]-x[2]) for x,b in zip(pts,pts[1:])]
rows2=rows[1:] if len(rows)>1 else rows
m=[statistics.median(r[i] for r in rows2) for i in range(3)]
tokens=B*a.new
print(json.dumps(dict(bench="trl_ppo",trl=trl.__version__,cfg=vars(a),steps=len(rows2),step_s=round(m[0],3),generate_s=round(m[1],3),logprob_s=round(m[2],3),update_s=round(m[0]-m[1]-m[2],3),
  sampled_tok=tokens,tok_per_s=round(tokens/m[0],1),gen_tok_per_s=round(tokens/m[1],1),first_step_s=round(rows[0][0],2),cold_to_first_step_s=round(marks[0][0]-T0,2),peak_memory_mb=round(peak_memory_mb()))))
